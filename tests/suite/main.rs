//! Tests of what users and attackers see, by theme, against real parts. The harness starts the parts that they need.

#![allow(missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod amqp;
mod d01_publisher;
mod d11_simulation;
mod d12_fairness;
mod dispatch;
mod documents;
mod files;
mod formats;
mod harness;
mod layers;
mod memory_broker;
mod n02_duplicate_instances;
mod n10_two_mappers;
mod n12_offline;
#[cfg(feature = "redis")]
mod n14_hostile_redis;
mod n14_proofs;
#[cfg(feature = "redis")]
mod n14_redis;
#[cfg(feature = "redis")]
mod n14_redis_connection;
mod n15_concurrency;
mod n16_config;
mod n17_processes;
mod n17_programs;
mod n18_daemon;
mod n19_send_file;
mod n19_transfers;
#[cfg(feature = "admin")]
mod n20_admin;
mod n21_console;
mod n22_permissions;
mod n22_setup;
mod n24_examples;
mod proxied_requests;
mod s01_envelope;
mod s01_oracles;
mod s01_vectors;
mod s02_own_store;
mod s02_stores;
mod s02_trust_store;
mod s03_certs_cli;
#[cfg(feature = "fuzzing")]
mod s04_pkits;
mod s04_revocation;
mod s04_running;
mod s04_trust;
mod s05_identity;
mod s06_freshness;
mod s06_restart;
mod s07_rotation;
#[cfg(feature = "cedar")]
mod s08_cedar;
mod s08_policy;
mod s09_audit;
mod s09_audit_end;
mod s10_algorithms;
mod s10_attacks;
mod s10_certificates;
mod s10_hostile_broker;
mod s10_properties;
mod s10_structure;
mod s11_at_rest;
#[cfg(feature = "fuzzing")]
mod s12_fuzzing;
mod s14_tls;
mod s17_proofs;
mod s18_broker_users;
mod s18_decoded_memory;
mod s18_memory_bounds;
mod s18_requests;
mod transport;
mod u01_demo;
mod u02_cli;
mod u02_exit_codes;
mod u03_doctor;
mod u04_inspect;
mod u09_front_door;
