// Command orders is a small HTTP service that Postern protects: people have orders, services see all of them, admins delete.
package main

import (
	"cmp"
	"context"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	postern "github.com/postern-auth/postern/clients/go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()

	// In production the connection has TLS: credentials.NewTLS(…).
	conn := must(grpc.NewClient(os.Getenv("POSTERN_GRPC_ADDR"),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second})))
	secret := os.Getenv("POSTERN_CLIENT_SECRET")
	if file := os.Getenv("POSTERN_CLIENT_SECRET_FILE"); file != "" {
		secret = strings.TrimSpace(string(must(os.ReadFile(file))))
	}
	source := postern.NewServiceTokenSource(conn, os.Getenv("POSTERN_CLIENT_ID"), secret)
	seconds := must(strconv.ParseFloat(cmp.Or(os.Getenv("ORDERS_MAX_STALENESS_SECONDS"), "30"), 64))
	choices := map[string]postern.WhenUnknown{"refuse": postern.RefuseWhenUnknown, "accept": postern.AcceptWhenUnknown}
	feed := must(postern.StartRevocationFeed(conn, source, postern.RevocationConfig{
		WhenUnknown:  choices[os.Getenv("ORDERS_WHEN_REVOCATIONS_UNKNOWN")],
		MaxStaleness: time.Duration(seconds * float64(time.Second)),
	}))
	verifier := must(postern.NewVerifier(postern.VerifierConfig{
		Issuer:      os.Getenv("POSTERN_ISSUER"),
		Audience:    os.Getenv("POSTERN_AUDIENCE"),
		Revocations: feed.State(),
	}))
	listener := must(net.Listen("tcp", os.Getenv("ORDERS_ADDR")))
	server := &http.Server{Handler: newHandler(verifier), ReadHeaderTimeout: 5 * time.Second}
	go func() { log.Fatal("orders: ", server.Serve(listener)) }()
	if feed.WaitComplete(ctx) == nil {
		fmt.Println("orders is ready")
	}
	<-ctx.Done()
}

func must[T any](value T, err error) T {
	if err != nil {
		log.Fatal("orders: ", err)
	}
	return value
}
