package postern

import (
	"context"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	authv1 "github.com/postern-auth/postern/clients/go/postern/auth/v1"
)

func TestEveryReasonOfTheContractHasAConstant(t *testing.T) {
	source := string(must(os.ReadFile("errors.go")))
	for _, name := range authv1.ErrorReason_name {
		reason := strings.TrimPrefix(name, "ERROR_REASON_")
		if reason != "UNSPECIFIED" && !strings.Contains(source, fmt.Sprintf("= %q\n", reason)) {
			t.Errorf("there is no constant for %s", reason)
		}
	}
}

func TestAnErrorKeepsItsDetailsThroughAStatus(t *testing.T) {
	sent := &Error{
		Code: codes.InvalidArgument, Reason: ReasonInvalidField, Message: "the email is malformed", RetryDelay: 1500 * time.Millisecond,
		Violations: []FieldViolation{{"email", "MALFORMED", "is malformed"}, {"", "TOO_LONG", "is too large"}},
	}
	received := ErrorOf(fmt.Errorf("signing up: %w", sent.GRPCStatus().Err()))
	received.Message = sent.Message // that of a wrapped status has the words around it
	if !reflect.DeepEqual(sent, received) {
		t.Fatalf("%+v became %+v", sent, received)
	}
	if wrapped := fmt.Errorf("refused: %w", sent); ErrorOf(wrapped) != sent || status.Code(wrapped) != codes.InvalidArgument {
		t.Fatal("a wrapped error is another one")
	}
}

func TestAnUnknownReasonIsKept(t *testing.T) {
	newer := must(status.New(codes.FailedPrecondition, "a second factor is needed").WithDetails(
		&errdetails.ErrorInfo{Reason: "SECOND_FACTOR_REQUIRED", Domain: ErrorDomain}, &errdetails.Help{}))
	found := ErrorOf(newer.Err())
	if found.Reason != "SECOND_FACTOR_REQUIRED" || found.Code != codes.FailedPrecondition {
		t.Fatalf("%+v", found)
	}
}

func TestAReasonOfAnotherDomainIsNone(t *testing.T) {
	other := must(status.New(codes.NotFound, "no").WithDetails(&errdetails.ErrorInfo{Reason: ReasonNotFound, Domain: "shop.example.com"}))
	wantReason(t, other.Err(), "")
}

func TestErrorsWithoutAStatusHaveACodeToo(t *testing.T) {
	for _, c := range []struct {
		err  error
		code codes.Code
	}{
		{errors.New("disk full"), codes.Unknown},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{fmt.Errorf("waiting: %w", context.Canceled), codes.Canceled},
		{status.Error(codes.Unavailable, "connection refused"), codes.Unavailable},
	} {
		if found := ErrorOf(c.err); found.Code != c.code || found.Reason != "" {
			t.Errorf("%v is %+v", c.err, found)
		}
	}
	if ErrorOf(nil) != nil || ReasonOf(nil) != "" {
		t.Error("no error is one")
	}
}
