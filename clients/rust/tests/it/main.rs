//! The library against the real server, at the addresses that `tests/libraries/stage` gives, and against small servers of its
//! own where a fault is needed that the real one does not have.

#![cfg(test)]

mod calls;
mod feed;
mod guard;
mod keys;
mod stage;
mod tokens;
mod vectors;
