package postern_test

// The code that README.md shows, which these tests run against a real server (tests/libraries/stage).

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	postern "github.com/postern-auth/postern/clients/go"
	authv1 "github.com/postern-auth/postern/clients/go/postern/auth/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
)

// errors
func explain(err error) string {
	failed := postern.ErrorOf(err)
	switch failed.Reason {
	case postern.ReasonInvalidField:
		return fmt.Sprint("please correct: ", failed.Violations)
	case postern.ReasonThrottled, postern.ReasonOverloaded:
		return fmt.Sprint("please wait for ", failed.RetryDelay)
	case postern.ReasonInvalidCredentials:
		return "the email or the password is wrong"
	}
	// An unknown reason: decide by the code.
	if failed.Code == codes.Unavailable {
		return "please try again"
	}
	return failed.Message
}

// store
// fileStore keeps the refresh token in a file that only its owner can read.
type fileStore string

func (file fileStore) Load(context.Context) (string, error) {
	token, err := os.ReadFile(string(file))
	if os.IsNotExist(err) {
		return "", nil
	}
	return string(token), err
}

func (file fileStore) Save(_ context.Context, refreshToken string) error {
	next := string(file) + ".next"
	if err := os.WriteFile(next, []byte(refreshToken), 0o600); err != nil {
		return err
	}
	return os.Rename(next, string(file))
}

func outgoing(posternAddr, clientID, clientSecret, shopAddr string) (*postern.TokenSource, *grpc.ClientConn, *grpc.ClientConn, error) {
	// outgoing
	conn, err := grpc.NewClient(posternAddr,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // or credentials.NewTLS(…)
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}))
	if err != nil {
		return nil, nil, nil, err
	}
	source := postern.NewServiceTokenSource(conn, clientID, clientSecret)

	shop, err := grpc.NewClient(shopAddr,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithPerRPCCredentials(source.PlaintextCredentials())) // with TLS: source.Credentials()
	// end
	return source, conn, shop, err
}

func protect(posternConn *grpc.ClientConn, source *postern.TokenSource, issuer, audience string) (*postern.RevocationFeed, *postern.Verifier, error) {
	// verify
	feed, err := postern.StartRevocationFeed(posternConn, source, postern.RevocationConfig{
		WhenUnknown: postern.RefuseWhenUnknown,
	})
	if err != nil {
		return nil, nil, err
	}
	verifier, err := postern.NewVerifier(postern.VerifierConfig{
		Issuer:      issuer,   // POSTERN_ISSUER of the server
		Audience:    audience, // POSTERN_AUDIENCE of the server
		Revocations: feed.State(),
	})
	// end
	return feed, verifier, err
}

func serveGRPC(verifier *postern.Verifier) *grpc.Server {
	// interceptors
	demands := postern.Demands{
		authv1.AuthService_GetMe_FullMethodName:             postern.Authenticated(),
		authv1.TokenService_WatchRevocations_FullMethodName: postern.Service(),
	}
	server := grpc.NewServer(
		grpc.ChainUnaryInterceptor(verifier.UnaryServerInterceptor(demands)),
		grpc.ChainStreamInterceptor(verifier.StreamServerInterceptor(demands)))
	// end
	return server
}

func serveHTTP(verifier *postern.Verifier) http.Handler {
	// middleware
	mux := http.NewServeMux()
	mux.HandleFunc("GET /orders", func(w http.ResponseWriter, r *http.Request) {
		caller, _ := postern.CallerFrom(r.Context())
		fmt.Fprintf(w, "the orders of %s\n", caller.Subject)
	})
	handler := verifier.ProtectMux(mux, postern.Demands{
		"GET /orders": postern.User().WithVerifiedEmail(),
	})
	// end
	return handler
}

type greeter struct {
	authv1.UnimplementedAuthServiceServer
}

func (greeter) GetMe(ctx context.Context, _ *authv1.GetMeRequest) (*authv1.GetMeResponse, error) {
	caller, _ := postern.CallerFrom(ctx)
	return &authv1.GetMeResponse{User: &authv1.User{Id: caller.Subject}}, nil
}

func TestStageTheCodeOfTheReadmeWorks(t *testing.T) {
	read := func(name string) string {
		value := os.Getenv(name)
		if value == "" {
			t.Fatalf("%s is not set: run this with tests/libraries/stage", name)
		}
		return value
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	id := read("POSTERN_CLIENT_ID")
	source, posternConn, shopConn, err := outgoing(read("POSTERN_GRPC_ADDR"), id, read("POSTERN_CLIENT_SECRET"), listener.Addr().String())
	check(err)
	feed, verifier, err := protect(posternConn, source, read("POSTERN_ISSUER"), read("POSTERN_AUDIENCE"))
	check(err)
	defer feed.Close()
	check(feed.WaitComplete(t.Context()))

	server := serveGRPC(verifier)
	authv1.RegisterAuthServiceServer(server, greeter{})
	go func() { _ = server.Serve(listener) }()
	defer server.Stop()
	shop := authv1.NewAuthServiceClient(shopConn)
	answer, err := shop.GetMe(t.Context(), &authv1.GetMeRequest{})
	if err != nil || answer.User.Id != id {
		t.Fatal(answer, err)
	}
	_, err = shop.SignUp(t.Context(), &authv1.SignUpRequest{})
	if explain(err) != "the caller lacks the role that this call needs" {
		t.Fatal(explain(err))
	}
	_, err = authv1.NewAuthServiceClient(posternConn).SignUp(t.Context(), &authv1.SignUpRequest{})
	if !strings.HasPrefix(explain(err), "please correct: [{") {
		t.Fatal(explain(err))
	}

	// A person who has just signed up has no verified address.
	store := fileStore(t.TempDir() + "/refresh-token")
	email, password := fmt.Sprintf("go-%d@example.com", time.Now().UnixNano()), "correct horse battery staple"
	auth := authv1.NewAuthServiceClient(posternConn)
	_, err = auth.SignUp(t.Context(), &authv1.SignUpRequest{Username: strings.Split(email, "@")[0], Email: email, Password: password})
	check(err)
	person := postern.NewLoginTokenSource(posternConn, email, password, store)
	token, err := person.Token(t.Context())
	check(err)
	request := httptest.NewRequest("GET", "/orders", nil)
	request.Header.Set("Authorization", "Bearer "+token)
	recorder := httptest.NewRecorder()
	serveHTTP(verifier).ServeHTTP(recorder, request)
	if recorder.Code != http.StatusForbidden || !strings.Contains(recorder.Body.String(), postern.ReasonEmailNotVerified) {
		t.Fatal(recorder.Code, recorder.Body)
	}

	// Another process continues the session with what the file has.
	again, err := postern.NewRefreshTokenSource(posternConn, store).Token(t.Context())
	check(err)
	me, err := auth.GetMe(metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+again), &authv1.GetMeRequest{})
	if err != nil || me.User.Email != email {
		t.Fatal(me, err)
	}
}

func TestTheReadmeShowsCodeThatTheTestsRun(t *testing.T) {
	flat := func(code string) string { return regexp.MustCompile(`(?m)^\s+`).ReplaceAllString(code, "") }
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	tests, err := os.ReadFile("readme_test.go")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(string(readme), -1)
	for _, block := range blocks {
		if !strings.Contains(flat(string(tests)), flat(block[1])) {
			t.Errorf("no test runs this:\n%s", block[1])
		}
	}
	if len(blocks) < 5 {
		t.Errorf("the README shows %d pieces of code", len(blocks))
	}
}
