package postern

import (
	"context"
	"errors"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
)

// ErrorDomain is the domain of the google.rpc.ErrorInfo of Postern's errors, and of the errors of this package.
const ErrorDomain = "postern.auth.v1"

// The reasons of Postern's errors; docs/errors.md describes each. Reasons are added over time: decide by the code of an
// error whose reason you do not know.
const (
	ReasonInvalidField        = "INVALID_FIELD"
	ReasonEmailTaken          = "EMAIL_TAKEN"
	ReasonUsernameTaken       = "USERNAME_TAKEN"
	ReasonInvalidCredentials  = "INVALID_CREDENTIALS"
	ReasonTokenMissing        = "TOKEN_MISSING"
	ReasonTokenInvalid        = "TOKEN_INVALID"
	ReasonTokenExpired        = "TOKEN_EXPIRED"
	ReasonSessionRevoked      = "SESSION_REVOKED"
	ReasonRefreshTokenInvalid = "REFRESH_TOKEN_INVALID"
	ReasonEmailNotVerified    = "EMAIL_NOT_VERIFIED"
	ReasonOneTimeTokenInvalid = "ONE_TIME_TOKEN_INVALID"
	ReasonRoleRequired        = "ROLE_REQUIRED"
	ReasonLastAdmin           = "LAST_ADMIN"
	ReasonNotFound            = "NOT_FOUND"
	ReasonThrottled           = "THROTTLED"
	ReasonOverloaded          = "OVERLOADED"
	ReasonStoreUnavailable    = "STORE_UNAVAILABLE"
	ReasonUserRequired        = "USER_REQUIRED"
	ReasonServiceRequired     = "SERVICE_REQUIRED"
	ReasonInvalidClient       = "INVALID_CLIENT"
	ReasonCursorExpired       = "CURSOR_EXPIRED"
)

// Error is a failed call, or a token or caller that was refused. A gRPC handler can return it as it is.
type Error struct {
	Code       codes.Code
	Reason     string           // one of the Reason constants, a newer one, or "" if the error has none
	Message    string           // for people; it may be reworded
	Violations []FieldViolation // the refused fields, with ReasonInvalidField
	RetryDelay time.Duration    // how long to wait before the call can succeed; 0 if the error does not tell
	cause      error            // for the log of this process; it is not sent
}

// FieldViolation says why a field of a request was refused.
type FieldViolation struct {
	Field       string // its path, such as "email"; "" if it is about the request as a whole
	Reason      string // for programs, such as "TOO_SHORT": docs/errors.md lists them
	Description string // for people
}

// ErrorOf reads any error: nil for nil, and codes.Unknown for an error that has no gRPC status.
func ErrorOf(err error) *Error {
	var own *Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &own):
		return own
	}
	read, ok := status.FromError(err)
	if !ok && (errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)) {
		read = status.FromContextError(err)
	}
	found := &Error{Code: read.Code(), Message: read.Message()}
	for _, detail := range read.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.Domain == ErrorDomain {
				found.Reason = detail.Reason
			}
		case *errdetails.BadRequest:
			for _, violation := range detail.FieldViolations {
				found.Violations = append(found.Violations, FieldViolation{violation.Field, violation.Reason, violation.Description})
			}
		case *errdetails.RetryInfo:
			found.RetryDelay = max(detail.RetryDelay.AsDuration(), 0)
		}
	}
	return found
}

// ReasonOf is the reason of any error, or "".
func ReasonOf(err error) string {
	if found := ErrorOf(err); found != nil {
		return found.Reason
	}
	return ""
}

// Error is the reason, or else the code, and the message, and the cause if it is known.
func (e *Error) Error() string {
	text := e.Code.String() + ": " + e.Message
	if e.Reason != "" {
		text = e.Reason + ": " + e.Message
	}
	if e.cause != nil {
		text += ": " + e.cause.Error()
	}
	return text
}

// Unwrap is the cause. It is not part of what [Error.GRPCStatus] sends.
func (e *Error) Unwrap() error { return e.cause }

// GRPCStatus is the error as a server sends it.
func (e *Error) GRPCStatus() *status.Status {
	var details []protoadapt.MessageV1
	if e.Reason != "" {
		details = append(details, &errdetails.ErrorInfo{Reason: e.Reason, Domain: ErrorDomain})
	}
	if len(e.Violations) > 0 {
		request := &errdetails.BadRequest{}
		for _, v := range e.Violations {
			violation := &errdetails.BadRequest_FieldViolation{Field: v.Field, Reason: v.Reason, Description: v.Description}
			request.FieldViolations = append(request.FieldViolations, violation)
		}
		details = append(details, request)
	}
	if e.RetryDelay > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(e.RetryDelay)})
	}
	bare := status.New(e.Code, e.Message)
	if full, err := bare.WithDetails(details...); err == nil {
		return full
	}
	return bare
}

// What the checks of this package answer, in the words of Postern's own.
var (
	errTokenMissing    = refusal(codes.Unauthenticated, ReasonTokenMissing, "this call needs an access token")
	errTokenInvalid    = refusal(codes.Unauthenticated, ReasonTokenInvalid, "the access token is invalid")
	errTokenExpired    = refusal(codes.Unauthenticated, ReasonTokenExpired, "the access token has expired")
	errSessionRevoked  = refusal(codes.Unauthenticated, ReasonSessionRevoked, "the session has ended")
	errUserRequired    = refusal(codes.PermissionDenied, ReasonUserRequired, "this call is for people, and the token is that of a service")
	errServiceRequired = refusal(codes.PermissionDenied, ReasonServiceRequired, "this call is for services, and the token is that of a person")
	errRoleRequired    = refusal(codes.PermissionDenied, ReasonRoleRequired, "the caller lacks the role that this call needs")
	errNotVerified     = refusal(codes.PermissionDenied, ReasonEmailNotVerified, "the email address is not verified")
	errUnknown         = refusal(codes.Unavailable, ReasonStoreUnavailable, "revocations unknown")
)

func refusal(code codes.Code, reason, message string) *Error {
	refused := &Error{Code: code, Reason: reason, Message: message}
	if code == codes.Unavailable {
		refused.RetryDelay = time.Second
	}
	return refused
}
