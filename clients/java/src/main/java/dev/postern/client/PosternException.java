package dev.postern.client;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import com.google.rpc.Status;
import io.grpc.Status.Code;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.time.Duration;
import java.util.List;
import java.util.Optional;

/**
 * A failed call, or a caller that is refused. It is what Postern sends, and what this library
 * answers to others.
 */
public final class PosternException extends RuntimeException {
  /** The domain of the reasons. */
  public static final String DOMAIN = "postern.auth.v1";

  private static final long serialVersionUID = 1;

  private final Code code;
  private final String reason;
  private final transient List<FieldViolation> fieldViolations;
  private final Duration retryDelay;

  /**
   * A field that was refused.
   *
   * @param field its name, such as {@code email}; empty if the whole request was refused
   * @param reason why, for programs, such as {@code TOO_SHORT}; docs/errors.md lists them
   * @param description why, for people
   */
  public record FieldViolation(String field, String reason, String description) {}

  private PosternException(
      Code code,
      String reason,
      String message,
      List<FieldViolation> violations,
      Duration retryDelay,
      Throwable cause) {
    super(message, cause, false, cause != null);
    this.code = code;
    this.reason = reason;
    this.fieldViolations = violations;
    this.retryDelay = retryDelay;
  }

  /**
   * A refusal by this library. It has no stack trace, because whoever sends bad tokens would make
   * the program fill it.
   */
  static PosternException refusal(Code code, String reason, String message) {
    Duration retryDelay = code == Code.UNAVAILABLE ? Duration.ofSeconds(1) : null;
    return new PosternException(code, reason, message, List.of(), retryDelay, null);
  }

  /**
   * Reads a failed call: what a stub has thrown, or anything else, which then is UNKNOWN. Never
   * throws.
   */
  public static PosternException from(Throwable thrown) {
    // A call that had no access token to send: it says why.
    Throwable origin = thrown instanceof StatusRuntimeException ? thrown.getCause() : thrown;
    if (origin instanceof PosternException known) {
      return known;
    }
    io.grpc.Status status = io.grpc.Status.fromThrowable(thrown);
    String reason = "";
    List<FieldViolation> violations = List.of();
    Duration retryDelay = null;
    Status details = StatusProto.fromThrowable(thrown);
    for (Any detail : details == null ? List.<Any>of() : details.getDetailsList()) {
      try {
        if (detail.is(ErrorInfo.class)) {
          ErrorInfo info = detail.unpack(ErrorInfo.class);
          reason = info.getDomain().equals(DOMAIN) ? info.getReason() : reason;
        } else if (detail.is(BadRequest.class)) {
          violations =
              detail.unpack(BadRequest.class).getFieldViolationsList().stream()
                  .map(
                      violation ->
                          new FieldViolation(
                              violation.getField(),
                              violation.getReason(),
                              violation.getDescription()))
                  .toList();
        } else if (detail.is(RetryInfo.class)) {
          var delay = detail.unpack(RetryInfo.class).getRetryDelay();
          retryDelay = Duration.ofSeconds(delay.getSeconds(), delay.getNanos());
        }
      } catch (InvalidProtocolBufferException | ArithmeticException malformed) {
        // The code and the message are still good.
      }
    }
    String message =
        status.getDescription() == null ? status.getCode().name() : status.getDescription();
    return new PosternException(status.getCode(), reason, message, violations, retryDelay, thrown);
  }

  /** The gRPC code. */
  public Code code() {
    return code;
  }

  /**
   * One of {@link Reason}, or one that is newer than this library. Empty if the answer had none.
   */
  public String reason() {
    return reason;
  }

  /** The fields that were refused, with {@link Reason#INVALID_FIELD}. */
  public List<FieldViolation> fieldViolations() {
    return fieldViolations == null ? List.of() : fieldViolations;
  }

  /** How long to wait before another try, if the answer said so. */
  public Optional<Duration> retryDelay() {
    return Optional.ofNullable(retryDelay);
  }

  /**
   * Whether the call may succeed when it is repeated unchanged: the answer was lost, or the server
   * has too much to do.
   */
  public boolean isTransient() {
    return code == Code.UNAVAILABLE
        || code == Code.DEADLINE_EXCEEDED
        || code == Code.RESOURCE_EXHAUSTED;
  }

  /** What a gRPC server answers: the code, the message and {@code google.rpc.ErrorInfo}. */
  public StatusRuntimeException toStatusException() {
    Status.Builder status = Status.newBuilder().setCode(code.value()).setMessage(getMessage());
    status.addDetails(Any.pack(ErrorInfo.newBuilder().setDomain(DOMAIN).setReason(reason).build()));
    retryDelay().ifPresent(delay -> status.addDetails(Any.pack(retryInfo(delay))));
    return StatusProto.toStatusRuntimeException(status.build());
  }

  private static Message retryInfo(Duration delay) {
    var seconds =
        com.google.protobuf.Duration.newBuilder()
            .setSeconds(delay.getSeconds())
            .setNanos(delay.getNano());
    return RetryInfo.newBuilder().setRetryDelay(seconds).build();
  }
}
