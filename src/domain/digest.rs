//! SHA-256 as an array of bytes, for what is stored or compared in the place of a secret.

use aws_lc_rs::digest;

/// The SHA-256 of some bytes.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    hash
}
