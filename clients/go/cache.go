package postern

import "sync"

// tokenCache remembers tokens by their SHA-256, at most rememberedTokens. It has two halves: when the young one is
// full, it becomes the old one, and what was in the old one and not used since is forgotten.
type tokenCache struct {
	mu         sync.Mutex
	young, old map[[32]byte]*verifiedToken
}

// get returns nil for an unknown token.
func (c *tokenCache) get(digest [32]byte) *verifiedToken {
	c.mu.Lock()
	defer c.mu.Unlock()
	if token := c.young[digest]; token != nil {
		return token
	}
	token := c.old[digest]
	if token != nil {
		c.add(digest, token)
	}
	return token
}

func (c *tokenCache) put(digest [32]byte, token *verifiedToken) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.add(digest, token)
}

func (c *tokenCache) add(digest [32]byte, token *verifiedToken) {
	if c.young == nil || len(c.young) >= rememberedTokens/2 {
		c.young, c.old = map[[32]byte]*verifiedToken{}, c.young
	}
	c.young[digest] = token
}
