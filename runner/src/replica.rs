//! Replicas: machines kept ready on another host, as chains of the hypervisor's own images.
//!
//! Not here: taking over and coming home (`failover`, `failback`).

pub mod state;
