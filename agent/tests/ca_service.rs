//! The CA service over its real TLS socket: who gets a certificate, who does not and why, what is written down, and what becomes of it when
//! files change, disks fill, nodes are shut out and processes die.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "ca_service/bed.rs"]
mod bed;
#[path = "ca_service/callers.rs"]
mod callers;
#[path = "ca_service/cluster.rs"]
mod cluster;
#[path = "ca_service/commands.rs"]
mod commands;
#[path = "ca_service/csr.rs"]
mod csr;
#[path = "ca_service/fake_cluster.rs"]
mod fake_cluster;
#[path = "ca_service/files.rs"]
mod files;
#[path = "ca_service/kubernetes.rs"]
mod kubernetes;
#[path = "ca_service/ledger.rs"]
mod ledger;
#[path = "ca_service/lives.rs"]
mod lives;
#[path = "ca_service/replicas.rs"]
mod replicas;
#[path = "ca_service/revocation.rs"]
mod revocation;
#[path = "support/rights.rs"]
mod rights;
#[path = "ca_service/rights.rs"]
mod rights_of_the_ca;
#[path = "ca_service/spent.rs"]
mod spent;
