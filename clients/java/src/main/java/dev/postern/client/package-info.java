/**
 * Access tokens of Postern: get them ({@link dev.postern.client.TokenSource}), verify them offline
 * ({@link dev.postern.client.Verifier}), follow their revocations ({@link
 * dev.postern.client.RevocationFeed}), and say which callers a method wants ({@link
 * dev.postern.client.Demands}).
 */
package dev.postern.client;
