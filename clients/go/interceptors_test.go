package postern

import (
	"context"
	"net"
	"testing"

	"google.golang.org/genproto/googleapis/api/annotations"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	authv1 "github.com/postern-auth/postern/clients/go/postern/auth/v1"
)

// serve starts a gRPC server in memory, and connects to it.
func serve(t *testing.T, register func(*grpc.Server), options ...grpc.ServerOption) *grpc.ClientConn {
	listener := bufconn.Listen(1 << 16)
	server := grpc.NewServer(options...)
	register(server)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	dial := grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) })
	conn := must(grpc.NewClient("passthrough:memory", dial, grpc.WithTransportCredentials(insecure.NewCredentials())))
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// shop is any service with a unary and a streaming method; the stubs of Postern have both. It answers with the caller.
type shop struct {
	authv1.UnimplementedAuthServiceServer
	authv1.UnimplementedTokenServiceServer
}

func (shop) GetMe(ctx context.Context, _ *authv1.GetMeRequest) (*authv1.GetMeResponse, error) {
	caller, ok := CallerFrom(ctx)
	if !ok {
		return &authv1.GetMeResponse{}, nil
	}
	return &authv1.GetMeResponse{User: &authv1.User{Id: caller.Subject}}, nil
}

func (shop) WatchRevocations(_ *authv1.WatchRevocationsRequest, stream grpc.ServerStreamingServer[authv1.WatchRevocationsResponse]) error {
	caller, _ := CallerFrom(stream.Context())
	return stream.Send(&authv1.WatchRevocationsResponse{Cursor: caller.Subject})
}

func TestTheInterceptorsRefuseByTheNameOfTheMethod(t *testing.T) {
	key, clock := newSigner("1"), newClock()
	verifier := newKeyServer(t, key).verifier(t, clock, nil)
	person, service := key.sign(personClaims(clock.now())), key.sign(serviceClaims(clock.now()))
	start := func(demands Demands) (authv1.AuthServiceClient, authv1.TokenServiceClient) {
		register := func(s *grpc.Server) {
			authv1.RegisterAuthServiceServer(s, shop{})
			authv1.RegisterTokenServiceServer(s, shop{})
		}
		conn := serve(t, register,
			grpc.UnaryInterceptor(verifier.UnaryServerInterceptor(demands)), grpc.StreamInterceptor(verifier.StreamServerInterceptor(demands)))
		return authv1.NewAuthServiceClient(conn), authv1.NewTokenServiceClient(conn)
	}
	auth, tokens := start(Demands{
		authv1.AuthService_GetMe_FullMethodName:             User(),
		authv1.TokenService_WatchRevocations_FullMethodName: Service(),
		authv1.AuthService_SignUp_FullMethodName:            Public(),
	})
	with := func(token string) context.Context {
		return metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+token)
	}

	answer, err := auth.GetMe(with(person), &authv1.GetMeRequest{})
	if err != nil || answer.User.GetId() != "user-1" {
		t.Fatal(answer, err)
	}
	message, err := must(tokens.WatchRevocations(with(service), &authv1.WatchRevocationsRequest{})).Recv()
	if err != nil || message.Cursor != "service-1" {
		t.Fatal(message, err)
	}
	_, err = auth.GetMe(with(service), &authv1.GetMeRequest{})
	wantReason(t, err, ReasonUserRequired)
	_, err = must(tokens.WatchRevocations(with(person), &authv1.WatchRevocationsRequest{})).Recv()
	wantReason(t, err, ReasonServiceRequired)
	_, err = auth.GetMe(t.Context(), &authv1.GetMeRequest{})
	wantReason(t, err, ReasonTokenMissing)
	if found := ErrorOf(err); found.Code != codes.Unauthenticated || found.Message != "this call needs an access token" {
		t.Fatal(found)
	}
	_, err = auth.GetMe(metadata.AppendToOutgoingContext(with(person), "authorization", "Bearer "+person), &authv1.GetMeRequest{})
	wantReason(t, err, ReasonTokenInvalid)
	// A declared method reaches its handler, and an undeclared one does not.
	_, err = auth.SignUp(with("nonsense"), &authv1.SignUpRequest{})
	if ErrorOf(err).Code != codes.Unimplemented {
		t.Fatal(err)
	}
	_, err = auth.Login(with(person), &authv1.LoginRequest{})
	wantReason(t, err, ReasonRoleRequired)
	if ErrorOf(err).Code != codes.PermissionDenied {
		t.Fatal(err)
	}
	_, undeclared := start(nil)
	_, err = must(undeclared.WatchRevocations(with(service), &authv1.WatchRevocationsRequest{})).Recv()
	wantReason(t, err, ReasonRoleRequired)
}

func TestAServiceSeesWhyPosternCannotBeAsked(t *testing.T) {
	key, clock := newSigner("1"), newClock()
	state := must(NewRevocationState(RevocationConfig{WhenUnknown: RefuseWhenUnknown, Clock: clock.now}))
	verifier := newKeyServer(t, key).verifier(t, clock, state)
	conn := serve(t, func(s *grpc.Server) { authv1.RegisterAuthServiceServer(s, shop{}) },
		grpc.UnaryInterceptor(verifier.UnaryServerInterceptor(Demands{authv1.AuthService_GetMe_FullMethodName: Authenticated()})))
	ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+key.sign(personClaims(clock.now())))
	_, err := authv1.NewAuthServiceClient(conn).GetMe(ctx, &authv1.GetMeRequest{})
	if found := ErrorOf(err); found.Code != codes.Unavailable || found.RetryDelay == 0 || found.Message != "revocations unknown" {
		t.Fatal(found)
	}
}

func TestTheStubsLiveBesideThePackagesOfGoogle(t *testing.T) {
	method := authv1.File_postern_auth_v1_token_service_proto.Services().ByName("TokenService").Methods().ByName("IntrospectToken")
	rule := proto.GetExtension(method.Options(), annotations.E_Http).(*annotations.HttpRule)
	access := proto.GetExtension(method.Options(), authv1.E_Access).(authv1.Access)
	if rule.GetPost() != "/v1/token/introspect" || access != authv1.Access_ACCESS_PUBLIC {
		t.Fatal(rule, access)
	}
}
