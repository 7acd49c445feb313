//! What the benches share: corpora and peers.
