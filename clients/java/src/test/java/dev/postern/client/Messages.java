package dev.postern.client;

import com.google.protobuf.Timestamp;
import dev.postern.auth.v1.Heartbeat;
import dev.postern.auth.v1.RolesChanged;
import dev.postern.auth.v1.SessionEnded;
import dev.postern.auth.v1.WatchRevocationsResponse;
import java.time.Instant;
import java.util.List;

/** Messages of the stream of revocations. */
public final class Messages {
  private Messages() {}

  public static WatchRevocationsResponse heartbeat(Instant completeTime) {
    return WatchRevocationsResponse.newBuilder()
        .setHeartbeat(Heartbeat.newBuilder().setCompleteTime(timestamp(completeTime)))
        .build();
  }

  public static WatchRevocationsResponse ended(String id, Instant forgetTime) {
    return WatchRevocationsResponse.newBuilder()
        .setSessionEnded(SessionEnded.newBuilder().setSessionId(id))
        .setForgetTime(timestamp(forgetTime))
        .build();
  }

  public static WatchRevocationsResponse roles(
      String id, Instant forgetTime, boolean disabled, String... roles) {
    return WatchRevocationsResponse.newBuilder()
        .setRolesChanged(
            RolesChanged.newBuilder()
                .setUserId(id)
                .setDisabled(disabled)
                .addAllRoles(List.of(roles)))
        .setForgetTime(timestamp(forgetTime))
        .build();
  }

  private static Timestamp timestamp(Instant time) {
    return Timestamp.newBuilder()
        .setSeconds(time.getEpochSecond())
        .setNanos(time.getNano())
        .build();
  }
}
