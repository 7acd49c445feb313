//! What the tests by promise share: the oracle, faults, crash images, fixtures, peers.
