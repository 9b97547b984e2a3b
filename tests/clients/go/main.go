// Gets, introspects and revokes tokens as another team's Go service would, with only the URL of the issuer.
//
//	oauth-client ISSUER < credentials
//
// Reads {"client_id", "client_secret", "refresh_token"}: those of a service, and the token of a person. Prints what came
// back of each step as JSON. An error of OAuth is printed as its code.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
)

// metadata holds the members of RFC 8414 that are needed here. The library has no discovery.
type metadata struct {
	Issuer                string `json:"issuer"`
	TokenEndpoint         string `json:"token_endpoint"`
	IntrospectionEndpoint string `json:"introspection_endpoint"`
	RevocationEndpoint    string `json:"revocation_endpoint"`
}

func main() {
	steps, err := run(context.Background(), os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	json.NewEncoder(os.Stdout).Encode(steps)
}

func run(ctx context.Context, issuer string) (map[string]any, error) {
	var given struct {
		ClientID     string `json:"client_id"`
		ClientSecret string `json:"client_secret"`
		RefreshToken string `json:"refresh_token"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		return nil, err
	}
	server, err := discover(issuer)
	if err != nil {
		return nil, err
	}
	service := clientcredentials.Config{
		ClientID: given.ClientID, ClientSecret: given.ClientSecret, TokenURL: server.TokenEndpoint,
	}
	own, err := service.Token(ctx)
	if err != nil {
		return nil, err
	}
	person := oauth2.Config{ClientID: "postern", Endpoint: oauth2.Endpoint{TokenURL: server.TokenEndpoint}}
	renewed, err := person.TokenSource(ctx, &oauth2.Token{RefreshToken: given.RefreshToken}).Token()
	if err != nil {
		return nil, err
	}
	// Every request of this client carries a token of the service.
	client := service.Client(ctx)
	introspect := func(token string) any { return post(client, server.IntrospectionEndpoint, token) }
	revoke := func(token string) any { return post(http.DefaultClient, server.RevocationEndpoint, token) }

	steps := map[string]any{
		"token_type":   own.TokenType,
		"expires_in":   time.Until(own.Expiry).Seconds(),
		"service":      introspect(own.AccessToken),
		"person":       introspect(renewed.AccessToken),
		"next_refresh": renewed.RefreshToken,
	}
	if steps["verified"], err = verified(ctx, issuer, renewed.AccessToken); err != nil {
		return nil, err
	}
	steps["revoked"] = revoke(renewed.RefreshToken)
	steps["after"] = introspect(renewed.AccessToken)
	// One that the client does not carry itself.
	spare, err := service.Token(ctx)
	if err != nil {
		return nil, err
	}
	steps["revoked_service"] = revoke(spare.AccessToken)
	steps["after_service"] = introspect(spare.AccessToken)
	steps["wrong_token"] = post(http.DefaultClient, server.IntrospectionEndpoint, own.AccessToken)

	wrong := service
	wrong.ClientSecret = "wrong"
	steps["wrong_secret"] = failure(wrong.Token(ctx))
	scoped := service
	scoped.Scopes = []string{"read"}
	steps["wrong_scope"] = failure(scoped.Token(ctx))
	steps["wrong_refresh"] = failure(person.TokenSource(ctx, &oauth2.Token{RefreshToken: renewed.RefreshToken}).Token())
	return steps, nil
}

// discover reads the metadata of an issuer without a path (RFC 8414 section 3).
func discover(issuer string) (found metadata, err error) {
	answer, err := http.Get(issuer + "/.well-known/oauth-authorization-server")
	if err != nil {
		return found, err
	}
	defer answer.Body.Close()
	if err := json.NewDecoder(answer.Body).Decode(&found); err != nil {
		return found, err
	}
	if found.Issuer != issuer {
		return found, fmt.Errorf("the issuer is %q", found.Issuer)
	}
	return found, nil
}

// verified is the subject of a token, which go-oidc checks with the keys that it finds by the issuer alone. It does not look at
// `typ`: whoever uses it like this has to.
func verified(ctx context.Context, issuer, token string) (string, error) {
	provider, err := oidc.NewProvider(ctx, issuer)
	if err != nil {
		return "", err
	}
	checked, err := provider.Verifier(&oidc.Config{ClientID: "postern"}).Verify(ctx, token)
	if err != nil {
		return "", err
	}
	return checked.Subject, nil
}

// post sends a token to an endpoint. It returns the answer: the members of a 200, nil if there are none, or an error's code.
func post(client *http.Client, endpoint, token string) any {
	answer, err := client.PostForm(endpoint, url.Values{"token": {token}})
	if err != nil {
		return err.Error()
	}
	defer answer.Body.Close()
	var members map[string]any
	json.NewDecoder(answer.Body).Decode(&members)
	if answer.StatusCode == http.StatusOK {
		return members
	}
	return members["error"]
}

// failure is the code of an error that the library has read.
func failure(_ *oauth2.Token, err error) any {
	var refused *oauth2.RetrieveError
	if errors.As(err, &refused) {
		return refused.ErrorCode
	}
	return fmt.Sprint(err)
}
