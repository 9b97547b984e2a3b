// The page of the test in a browser: a person signs up, logs in, stays logged in, and logs out. What happened is posted to
// the server of the page.

import { AuthService } from "@postern/client/stubs";
import {
  createClient,
  loginTokens,
  PosternError,
  type RefreshTokenStore,
  sessionTokens,
  webTransport,
} from "@postern/client/web";

const postern = new URLSearchParams(location.search).get("postern") as string;

// [browser]
const store: RefreshTokenStore = {
  load: () => localStorage.getItem("refresh-token") ?? undefined,
  save: (token) => (token ? localStorage.setItem("refresh-token", token) : localStorage.removeItem("refresh-token")),
};

async function signUpAndReadAccount(username: string, email: string, password: string) {
  await createClient(AuthService, webTransport(postern)).signUp({ username, email, password });
  const tokens = loginTokens(webTransport(postern), { email, password }, { store });
  const { user } = await createClient(AuthService, webTransport(postern, tokens)).getMe({});
  return user?.email;
}
// [end]

const reasonOf = (call: Promise<unknown>) =>
  call.then(
    () => "ACCEPTED",
    (error: unknown) => PosternError.from(error).reason || `code ${PosternError.from(error).code}`,
  );

async function run() {
  const name = `web-${crypto.randomUUID().slice(0, 8)}`;
  const [email, password] = [`${name}@example.com`, "correct horse battery staple"];
  const open = createClient(AuthService, webTransport(postern));
  const account = await signUpAndReadAccount(name, email, password);
  const first = store.load();

  // As after a reload of the page: the session is in the store.
  const tokens = sessionTokens(webTransport(postern), {}, { store });
  const mine = createClient(AuthService, webTransport(postern, tokens));
  const again = (await mine.getMe({})).user?.email;
  const rotated = store.load() !== first;
  tokens.discard(await tokens.token());
  const refreshed = (await mine.getMe({})).user?.email;

  const taken = await reasonOf(open.signUp({ username: name, email, password }));
  const missing = await reasonOf(open.getMe({}));
  const unreachable = sessionTokens(webTransport("http://127.0.0.1:9"), {}, { store, patienceMs: 500 });
  const lost = await reasonOf(unreachable.token());
  const keptWhileLost = store.load() !== undefined;
  await open.logout({ refreshToken: (await store.load()) as string });
  tokens.discard(await tokens.token());
  const afterLogout = await reasonOf(tokens.token());
  const isStoreEmpty = store.load() === undefined;
  const isExpected = account === email && again === email && refreshed === email;
  return { isExpected, rotated, taken, missing, lost, keptWhileLost, afterLogout, isStoreEmpty };
}

void run()
  .catch((error: unknown) => ({ error: String(error) }))
  .then((result) => fetch("/result", { method: "POST", body: JSON.stringify(result) }));
