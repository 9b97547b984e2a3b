package postern

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// Demands has what each method wants. A method that is not there is refused for everybody. The key of a gRPC method is
// its full name, such as "/shop.v1.Orders/List", which is also the generated constant Orders_List_FullMethodName. The
// key of an HTTP route is its pattern in the mux, such as "GET /orders/{id}".
type Demands map[string]Demand

// UnaryServerInterceptor refuses unary calls that do not meet the demands. [CallerFrom] has the caller of those that
// do.
func (v *Verifier) UnaryServerInterceptor(demands Demands) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, request any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		ctx, err := v.authorizeCall(ctx, demands[info.FullMethod])
		if err != nil {
			return nil, err
		}
		return handle(ctx, request)
	}
}

// StreamServerInterceptor does the same for streams, when they begin. A stream goes on when the token of its caller has
// expired.
func (v *Verifier) StreamServerInterceptor(demands Demands) grpc.StreamServerInterceptor {
	return func(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
		ctx, err := v.authorizeCall(stream.Context(), demands[info.FullMethod])
		if err != nil {
			return err
		}
		return handle(server, &authorizedStream{stream, ctx})
	}
}

func (v *Verifier) authorizeCall(ctx context.Context, demand Demand) (context.Context, error) {
	caller, err := v.Authorize(ctx, metadata.ValueFromIncomingContext(ctx, "authorization"), demand)
	return withCaller(ctx, caller), err
}

type authorizedStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *authorizedStream) Context() context.Context { return s.ctx }
