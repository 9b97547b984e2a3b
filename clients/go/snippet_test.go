package postern_test

// The function that docs/errors.md shows for programs without this library; tests/libraries/test_snippets.py compares them.

import (
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func reasonOf(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.GetDomain() == "postern.auth.v1" {
			return info.GetReason()
		}
	}
	return ""
}

func TestTheReasonOfAnErrorWithoutThisLibrary(t *testing.T) {
	for domain, want := range map[string]string{"postern.auth.v1": "FROM_THE_FUTURE", "another": ""} {
		info := &errdetails.ErrorInfo{Reason: "FROM_THE_FUTURE", Domain: domain}
		failed, err := status.New(codes.Aborted, "").WithDetails(info)
		if got := reasonOf(failed.Err()); err != nil || got != want {
			t.Errorf("%s: %q, %v", domain, got, err)
		}
	}
	if got := reasonOf(status.Error(codes.Unavailable, "")); got != "" {
		t.Error(got)
	}
}
