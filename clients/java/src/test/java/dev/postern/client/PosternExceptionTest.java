package dev.postern.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.Any;
import com.google.protobuf.ByteString;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import com.google.rpc.Status;
import dev.postern.auth.v1.ErrorReason;
import io.grpc.Status.Code;
import io.grpc.protobuf.StatusProto;
import java.time.Duration;
import java.util.Arrays;
import java.util.List;
import java.util.TreeSet;
import org.junit.jupiter.api.Test;

class PosternExceptionTest {
  private static PosternException read(Code code, Any... details) {
    Status status =
        Status.newBuilder()
            .setCode(code.value())
            .setMessage("why")
            .addAllDetails(List.of(details))
            .build();
    return PosternException.from(StatusProto.toStatusRuntimeException(status));
  }

  private static Any info(String domain, String reason) {
    return Any.pack(ErrorInfo.newBuilder().setDomain(domain).setReason(reason).build());
  }

  @Test
  void everythingIsRead() {
    var violation =
        BadRequest.FieldViolation.newBuilder()
            .setField("email")
            .setReason("MALFORMED")
            .setDescription("malformed");
    var delay = com.google.protobuf.Duration.newBuilder().setSeconds(2).setNanos(500_000_000);
    PosternException failure =
        read(
            Code.INVALID_ARGUMENT,
            info("postern.auth.v1", "INVALID_FIELD"),
            Any.pack(BadRequest.newBuilder().addFieldViolations(violation).build()),
            Any.pack(RetryInfo.newBuilder().setRetryDelay(delay).build()));
    assertEquals(Code.INVALID_ARGUMENT, failure.code());
    assertEquals(Reason.INVALID_FIELD, failure.reason());
    assertEquals("why", failure.getMessage());
    assertEquals(
        List.of(new PosternException.FieldViolation("email", "MALFORMED", "malformed")),
        failure.fieldViolations());
    assertEquals(Duration.ofMillis(2500), failure.retryDelay().orElseThrow());
  }

  @Test
  void aReasonThatIsNewerThanTheLibraryIsPassedOn() {
    PosternException failure =
        read(Code.FAILED_PRECONDITION, info("postern.auth.v1", "MOON_PHASE_WRONG"));
    assertEquals("MOON_PHASE_WRONG", failure.reason());
    assertEquals(Code.FAILED_PRECONDITION, failure.code());
  }

  @Test
  void theReasonOfSomebodyElseIsNotOurs() {
    assertEquals(
        "", read(Code.UNAUTHENTICATED, info("elsewhere.example", "TOKEN_EXPIRED")).reason());
  }

  @Test
  void whatCannotBeReadIsLeftOut() {
    Any broken =
        Any.pack(ErrorInfo.getDefaultInstance()).toBuilder()
            .setValue(ByteString.copyFromUtf8("\u0001"))
            .build();
    Any unknown = broken.toBuilder().setTypeUrl("type.googleapis.com/google.rpc.Unheard").build();
    assertEquals("", read(Code.NOT_FOUND, broken, unknown).reason());
    assertEquals(Code.NOT_FOUND, read(Code.NOT_FOUND, broken, unknown).code());
  }

  @Test
  void whatIsNoFailedCallIsUnknown() {
    assertEquals(Code.UNKNOWN, PosternException.from(new IllegalStateException("boom")).code());
    assertEquals(
        Code.UNAVAILABLE, PosternException.from(io.grpc.Status.UNAVAILABLE.asException()).code());
  }

  @Test
  void whatIsAnsweredIsReadAgain() {
    var refusal =
        PosternException.refusal(Code.UNAVAILABLE, Reason.STORE_UNAVAILABLE, "revocations unknown");
    PosternException read = PosternException.from(refusal.toStatusException());
    assertEquals(Reason.STORE_UNAVAILABLE, read.reason());
    assertEquals("revocations unknown", read.getMessage());
    assertEquals(Duration.ofSeconds(1), read.retryDelay().orElseThrow());
    assertTrue(read.isTransient());
  }

  @Test
  void theConstantsAreTheReasonsOfTheContract() throws Exception {
    var contract = new TreeSet<String>();
    for (ErrorReason reason : ErrorReason.values()) {
      contract.add(reason.name().replace("ERROR_REASON_", ""));
    }
    contract.removeAll(List.of("UNSPECIFIED", "UNRECOGNIZED"));
    var constants = new TreeSet<String>();
    for (var field : Reason.class.getFields()) {
      assertEquals(field.getName(), field.get(null));
      constants.add(field.getName());
    }
    assertEquals(contract, constants, Arrays.toString(ErrorReason.values()));
  }
}
