//! The command line as its users meet it: a contract, told by running the binary.

mod beside;
mod bitmap;
mod carrier;
mod cluster;
mod contract;
mod docs;
mod foreign;
mod golden;
mod harness;
mod hostile;
mod images;
mod in_guest;
mod kept;
#[path = "../../../tests/src/ledger.rs"]
#[allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "shared with the tests of the other rooms")]
mod ledger;
mod look;
mod measure;
#[path = "../../../tests/src/postgres.rs"]
#[allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "shared with the tests of the other rooms")]
mod postgres;
mod proxies;
mod recall;
mod reclaim;
mod replication;
mod replication_killed;
mod repo_jobs;
mod running;
mod signals;
mod site_jobs;
mod storm;
mod takeover;
mod takeover_kept;
mod takeover_killed;
mod whole;
