package postern

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// SubjectType says what kind of caller a token stands for.
type SubjectType string

// The kinds of callers.
const (
	SubjectUser    SubjectType = "user"    // a person
	SubjectService SubjectType = "service" // a service account
)

// Caller is whom an accepted access token stands for.
type Caller struct {
	Subject       string // the id of the user or of the service account; it is never reused
	SubjectType   SubjectType
	ClientID      string   // "postern" for a person, else the id of the service account
	SessionID     string   // the id of the session, or of the key of the service account
	TokenID       string   // the id of this token
	Username      string   // the name of the account, as it was when the token was issued
	Email         string   // the address of a person; "" for a service
	EmailVerified bool     // whether the address was verified when the token was issued
	Roles         []string // those of the token, or newer ones from the stream of revocations
	ExpireTime    time.Time
}

// HasRole tells whether the caller has this role.
func (c *Caller) HasRole(role string) bool { return slices.Contains(c.Roles, role) }

const (
	base64url = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	// The last second that a token may name: the end of the year 9998. A leeway can be added to it.
	latestTime = 253_370_764_799
)

// verifiedToken is what a token says whose signature was verified. Its times are not checked yet.
type verifiedToken struct {
	kid, alg    string
	caller      Caller
	iat, exp    int64 // in seconds
	iss, aud    string
	signedInput string // the first two segments
	signature   []byte
}

// readToken reads a compact JWS of Postern's form (RFC 7515, RFC 9068). It verifies nothing. It returns nil for
// anything else.
func readToken(token string) *verifiedToken {
	segments := strings.Split(token, ".")
	if len(segments) != 3 {
		return nil
	}
	var decoded [3][]byte
	for i, segment := range segments {
		data, err := base64.RawURLEncoding.Strict().DecodeString(segment)
		// Go's decoder skips line breaks.
		if err != nil || strings.Trim(segment, base64url) != "" {
			return nil
		}
		decoded[i] = data
	}
	read := verifiedToken{signedInput: token[:len(token)-len(segments[2])-1], signature: decoded[2]}
	if !read.readHeader(decoded[0]) || !read.readClaims(decoded[1]) {
		return nil
	}
	return &read
}

// readHeader wants exactly these members. Any other one is refused, in particular crit, b64, zip, jwk, jku, x5c and
// x5u.
func (t *verifiedToken) readHeader(data []byte) bool {
	header := readObject(data)
	t.kid, t.alg = header.text("kid"), header.text("alg")
	return header.text("typ") == "at+jwt" && !header.isBad && len(header.members) == 3
}

func (t *verifiedToken) readClaims(data []byte) bool {
	claims := readObject(data)
	t.iss, t.aud = claims.text("iss"), claims.text("aud")
	t.iat, t.exp = claims.seconds("iat"), claims.seconds("exp")
	email, verified := optional[string](claims, "email"), optional[bool](claims, "email_verified")
	kind := SubjectUser // of tokens from before there was this claim
	if claims.members["subject_type"] != nil {
		kind = SubjectType(claims.text("subject_type"))
	}
	t.caller = Caller{
		Subject:     claims.text("sub"),
		SubjectType: kind,
		ClientID:    claims.text("client_id"),
		SessionID:   claims.text("sid"),
		TokenID:     claims.text("jti"),
		Username:    claims.text("username"),
		Roles:       claims.texts("roles"),
		ExpireTime:  time.Unix(t.exp, 0),
	}
	if claims.isBad || t.caller.Subject == "" || t.caller.SessionID == "" {
		return false
	}
	switch kind {
	case SubjectUser:
		if email == nil || verified == nil {
			return false
		}
		t.caller.Email, t.caller.EmailVerified = *email, *verified
		return true
	case SubjectService:
		return email == nil && verified == nil && t.caller.ClientID == t.caller.Subject
	default:
		return false
	}
}

// object is a JSON object. encoding/json alone would take "ISS" for "iss", and the last of two members with one name.
type object struct {
	members map[string]json.RawMessage
	isBad   bool // no object, or a member that was asked for is missing or has another type
}

func readObject(data []byte) *object {
	read := &object{members: map[string]json.RawMessage{}, isBad: !utf8.Valid(data) || !json.Valid(data)}
	decoder := json.NewDecoder(bytes.NewReader(data))
	if start, err := decoder.Token(); read.isBad || err != nil || start != json.Delim('{') {
		read.isBad = true
		return read
	}
	for decoder.More() {
		name, nameErr := decoder.Token()
		text, _ := name.(string)
		var value json.RawMessage
		if nameErr != nil || decoder.Decode(&value) != nil || read.members[text] != nil {
			read.isBad = true
			return read
		}
		read.members[text] = value
	}
	return read
}

// optional is a member, or nil if it is missing or null.
func optional[T any](o *object, name string) *T {
	var value *T
	if raw := o.members[name]; raw != nil && json.Unmarshal(raw, &value) != nil {
		o.isBad = true
	}
	return value
}

func required[T any](o *object, name string) (value T) {
	if found := optional[T](o, name); found != nil {
		return *found
	}
	o.isBad = true
	return value
}

func (o *object) text(name string) string { return required[string](o, name) }

func (o *object) texts(name string) []string {
	texts := []string{}
	for _, text := range required[[]*string](o, name) {
		if text == nil {
			o.isBad = true
			return nil
		}
		texts = append(texts, *text)
	}
	return texts
}

// seconds is a NumericDate, which is a whole number in Postern's tokens.
func (o *object) seconds(name string) int64 {
	seconds, err := strconv.ParseInt(string(o.members[name]), 10, 64)
	if err != nil {
		o.isBad = true
	}
	return min(max(seconds, 0), latestTime)
}
