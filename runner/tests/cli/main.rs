//! The command line as its users meet it: a contract, told by running the binary.

mod bitmap;
mod cluster;
mod contract;
mod docs;
mod foreign;
mod golden;
mod harness;
mod hostile;
mod images;
mod kept;
mod look;
mod measure;
mod reclaim;
mod replication;
mod repo_jobs;
mod running;
mod signals;
mod site_jobs;
mod storm;
mod takeover;
mod takeover_kept;
mod takeover_killed;
mod whole;
