// Package postern lets a Go service call others with an access token of Postern, and accept such tokens itself.
//
// [TokenSource] gets access tokens and renews them. [Verifier] checks access tokens offline, [RevocationFeed] tells it
// which of them were revoked, and its interceptors and middleware refuse callers that do not meet a [Demand]. [ErrorOf]
// reads the errors of Postern. The generated stubs are in postern/auth/v1.
//
// All types may be used by several goroutines at once.
package postern
