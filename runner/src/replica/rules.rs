//! What a job says of its replicas beside their content: disks that are left out, networks, addresses.
//!
//! Invariants
//! - The rules of the job's last run are recorded with the replica: a takeover finds them when the site file is lost.
//! - A restore point keeps the machine as it was; rules are applied to what the host is given.
//!
//! Not here: changing addresses inside a guest (`readdress`).

use std::net::Ipv4Addr;

use aquifer_formats::repo::record::MachineDescription;
use serde::{Deserialize, Serialize};

pub use crate::site::Through;
use crate::site::{ReplicationJob, Site};

/// Rules of a replica.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rules {
    /// Disks that are left out.
    pub exclude_disks: Vec<String>,
    /// Networks of the target.
    pub networks: Vec<Network>,
    /// Addresses after a takeover.
    pub addresses: Vec<Addresses>,
}

/// A network of production and what takes its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Production's: `NAME`, or `NAME.VLAN` as machines name a network with its VLAN.
    pub from: String,
    /// The target's.
    pub to: String,
    /// VLAN of production; none and 0 are any.
    #[serde(default)]
    pub from_vlan: Option<u32>,
    /// VLAN of the target; none and 0 are untagged.
    #[serde(default)]
    pub to_vlan: Option<u32>,
}

/// A rule for addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// Pattern of production, a star for any number.
    pub from: String,
    /// Pattern of the target.
    pub to: String,
    /// Netmask.
    pub mask: String,
    /// Default gateway.
    #[serde(default)]
    pub gateway: Option<String>,
    /// Name servers.
    #[serde(default)]
    pub dns: Vec<String>,
    /// Who changes them in the guest.
    #[serde(default)]
    pub through: Through,
}

impl Addresses {
    /// What takes the place of an address; none where this rule is not for it.
    pub fn moved(&self, address: Ipv4Addr) -> Option<Ipv4Addr> {
        let (from, to): (Vec<&str>, Vec<&str>) = (self.from.split('.').collect(), self.to.split('.').collect());
        if from.len() != 4 || to.len() != 4 {
            return None;
        }
        let mut new = [0; 4];
        for (((part, from), to), new) in address.octets().into_iter().zip(from).zip(to).zip(&mut new) {
            if from != "*" && from.parse() != Ok(part) {
                return None;
            }
            *new = if to == "*" { part } else { to.parse().ok()? };
        }
        Some(new.into())
    }

    /// Length of the network's part; none where the netmask is none.
    pub fn length(&self) -> Option<u32> {
        let mask = u32::from(self.mask.parse::<Ipv4Addr>().ok()?);
        (mask.leading_ones() == mask.count_ones()).then(|| mask.count_ones())
    }
}

impl Rules {
    /// What the site file says.
    pub fn of(site: &Site, job: &ReplicationJob, machine: &str) -> Self {
        let networks = job.network_map.iter().map(|map| Network {
            from: map.from.clone(),
            to: map.to.clone(),
            from_vlan: map.from_vlan,
            to_vlan: map.to_vlan,
        });
        let addresses = job.reip.iter().map(|rule| Addresses {
            from: rule.from.clone(),
            to: rule.to.clone(),
            mask: rule.mask.clone(),
            gateway: rule.gateway.clone(),
            dns: rule.dns.clone(),
            through: rule.through,
        });
        Self {
            exclude_disks: site.machines.get(machine).map(|machine| machine.exclude_disks.clone()).unwrap_or_default(),
            networks: networks.collect(),
            addresses: addresses.collect(),
        }
    }

    /// Whether a disk is left out.
    pub fn leave_out(&self, disk: &str) -> bool {
        self.exclude_disks.iter().any(|out| out == disk)
    }

    /// The machine on the networks of the target.
    #[must_use]
    pub fn moved(&self, description: &MachineDescription) -> MachineDescription {
        let mut moved = description.clone();
        for nic in &mut moved.nics {
            nic.network = nic.network.as_deref().map(|network| self.forth(network));
        }
        moved
    }

    /// Rules for addresses as programs are given them: one in a line, its parts apart by spaces, `-` for what is not said.
    pub fn lines(&self) -> String {
        let line = |rule: &Addresses| {
            let gateway = rule.gateway.as_deref().unwrap_or("-");
            let dns = if rule.dns.is_empty() { "-".to_owned() } else { rule.dns.join(",") };
            format!("{} {} {} {gateway} {dns}\n", rule.from, rule.to, rule.mask)
        };
        self.addresses.iter().map(line).collect()
    }

    /// The target's name for a network of production.
    pub fn forth(&self, network: &str) -> String {
        let rule = self.networks.iter().find(|rule| rule.covers(network));
        rule.map_or_else(|| network.to_owned(), Network::name)
    }

    /// Production's name for a network of the target.
    pub fn back(&self, network: &str) -> String {
        let rule = self.networks.iter().find(|rule| rule.name() == network);
        rule.map_or_else(
            || network.to_owned(),
            |rule| match rule.from_vlan.unwrap_or(0) {
                0 => rule.from.clone(),
                vlan => format!("{}.{vlan}", rule.from),
            },
        )
    }
}

impl Network {
    /// Whether a machine's network is meant.
    fn covers(&self, network: &str) -> bool {
        let (name, vlan) = split(network);
        match self.from_vlan.unwrap_or(0) {
            0 => self.from == network || self.from == name,
            wanted => self.from == name && vlan == Some(wanted),
        }
    }

    /// As machines name it.
    fn name(&self) -> String {
        match self.to_vlan.unwrap_or(0) {
            0 => self.to.clone(),
            vlan => format!("{}.{vlan}", self.to),
        }
    }
}

/// `NAME.VLAN` in its parts.
fn split(network: &str) -> (&str, Option<u32>) {
    match network.rsplit_once('.') {
        Some((name, vlan)) if !name.is_empty() => vlan.parse().map_or((network, None), |vlan| (name, Some(vlan))),
        _ => (network, None),
    }
}

#[cfg(test)]
mod tests {
    use aquifer_formats::repo::record::NicDescription;

    use super::*;

    fn machine(networks: &[&str]) -> MachineDescription {
        let nic = |network: &&str| NicDescription { mac: None, network: Some((*network).into()), model: None };
        MachineDescription { nics: networks.iter().map(nic).collect(), ..MachineDescription::default() }
    }

    fn rule(from: &str, from_vlan: u32, to: &str, to_vlan: u32) -> Network {
        Network { from: from.into(), to: to.into(), from_vlan: Some(from_vlan), to_vlan: Some(to_vlan) }
    }

    #[test]
    fn networks_are_mapped_with_their_vlans() {
        let networks = vec![rule("prod", 12, "dr", 112), rule("prod", 0, "dr", 0), rule("store", 0, "dr-store", 7)];
        let rules = Rules { networks, ..Rules::default() };
        let moved = rules.moved(&machine(&["prod.12", "prod.13", "prod", "store", "other", "db.lan"]));
        let names: Vec<_> = moved.nics.iter().filter_map(|nic| nic.network.as_deref()).collect();
        assert_eq!(names, ["dr.112", "dr", "dr", "dr-store.7", "other", "db.lan"]);
    }
}
