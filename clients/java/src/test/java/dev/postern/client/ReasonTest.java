package dev.postern.client;

import static org.junit.jupiter.api.Assertions.assertEquals;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.Code;
import com.google.rpc.ErrorInfo;
import io.grpc.Status;
import io.grpc.protobuf.StatusProto;
import org.junit.jupiter.api.Test;

/**
 * The function that docs/errors.md shows for programs without this library;
 * tests/libraries/test_snippets.py compares them.
 */
class ReasonTest {
  static String reasonOf(Throwable error) throws InvalidProtocolBufferException {
    com.google.rpc.Status status = StatusProto.fromThrowable(error);
    if (status == null) {
      return "";
    }
    for (Any detail : status.getDetailsList()) {
      if (detail.is(ErrorInfo.class)) {
        ErrorInfo info = detail.unpack(ErrorInfo.class);
        return info.getDomain().equals("postern.auth.v1") ? info.getReason() : "";
      }
    }
    return "";
  }

  @Test
  void theReasonOfAnErrorWithoutThisLibrary() throws Exception {
    assertEquals("FROM_THE_FUTURE", reasonOf(failure("postern.auth.v1")));
    assertEquals("", reasonOf(failure("another")));
    assertEquals("", reasonOf(Status.UNAVAILABLE.asRuntimeException()));
  }

  private static Throwable failure(String domain) {
    var info = ErrorInfo.newBuilder().setReason("FROM_THE_FUTURE").setDomain(domain).build();
    return StatusProto.toStatusRuntimeException(
        com.google.rpc.Status.newBuilder()
            .setCode(Code.ABORTED_VALUE)
            .addDetails(Any.pack(info))
            .build());
  }
}
