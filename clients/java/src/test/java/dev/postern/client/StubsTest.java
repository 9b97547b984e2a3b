package dev.postern.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.api.AnnotationsProto;
import com.google.api.HttpRule;
import com.google.rpc.ErrorInfo;
import dev.postern.auth.v1.Access;
import dev.postern.auth.v1.AccessOuterClass;
import dev.postern.auth.v1.AuthServiceGrpc;
import dev.postern.auth.v1.AuthServiceOuterClass;
import dev.postern.auth.v1.GetMeRequest;
import dev.postern.auth.v1.LoginRequest;
import io.grpc.ManagedChannel;
import io.grpc.StatusRuntimeException;
import org.junit.jupiter.api.Assertions;
import org.junit.jupiter.api.Test;

/** The generated classes beside the packages of googleapis, in one program. */
class StubsTest {
  @Test
  void theRoutesAndTheAccessOfAMethodCanBeRead() {
    var method =
        AuthServiceOuterClass.getDescriptor()
            .findServiceByName("AuthService")
            .findMethodByName("GetMe");
    HttpRule rule = method.getOptions().getExtension(AnnotationsProto.http);
    assertEquals("/v1/me", rule.getGet());
    assertEquals(
        Access.ACCESS_AUTHENTICATED, method.getOptions().getExtension(AccessOuterClass.access));
  }

  @Test
  void aMethodIsCalledAndItsErrorIsMadeOfTheDetailsOfGoogleapis() throws Exception {
    ManagedChannel channel = Env.channel();
    try {
      var stub = AuthServiceGrpc.newBlockingStub(channel);
      var thrown =
          Assertions.assertThrows(
              StatusRuntimeException.class, () -> stub.getMe(GetMeRequest.getDefaultInstance()));
      var status = io.grpc.protobuf.StatusProto.fromThrowable(thrown);
      ErrorInfo info = status.getDetails(0).unpack(ErrorInfo.class);
      assertEquals("TOKEN_MISSING", info.getReason());
    } finally {
      channel.shutdownNow();
    }
  }

  @Test
  void secretsAreInTheTextOfAMessage() {
    String text = LoginRequest.newBuilder().setPassword("hunter2").build().toString();
    assertTrue(
        text.contains("hunter2"),
        "protobuf-java now hides fields with debug_redact: README.md says otherwise");
  }
}
