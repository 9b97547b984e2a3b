-- Where the trace goes on of the call that caused a mail, as a W3C traceparent. None if that call was not traced.
ALTER TABLE mail_outbox ADD COLUMN trace_parent text;
