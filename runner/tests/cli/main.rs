//! The command line as its users meet it: a contract, told by running the binary.

mod beside;
mod bitmap;
mod carrier;
mod checked;
mod cluster;
mod contract;
mod docs;
mod foreign;
mod golden;
mod gone;
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
mod older_point;
mod on_hold;
#[path = "../../../tests/src/postgres.rs"]
#[allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "shared with the tests of the other rooms")]
mod postgres;
mod proxies;
mod recall;
mod reclaim;
mod replication;
mod replication_killed;
mod repo_jobs;
mod retained;
mod running;
mod signals;
mod site_jobs;
mod storm;
mod takeover;
mod takeover_foreseen;
mod takeover_held;
mod takeover_kept;
mod takeover_killed;
mod takeover_shown;
mod takeover_told;
mod takeover_waits;
mod whole;
