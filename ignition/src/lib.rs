//! Configurations of Container Linux in, one validated Ignition configuration out. Pure: no files, no network, no clock; the
//! same text gives the same bytes. The text is not trusted: its size, depth and number of values are bounded.
//!
//! The way of a text: [`transpile()`] tells its [`Kind`], reads it into a tree whose nodes know where they stand, holds the tree
//! against the language's table, translates it, and checks the outcome as Ignition would; whatever there is to say comes in
//! one [`Report`], in places of the user's own text.
//!
//! - [`transpile()`]: any language to a [`Config`]
//! - [`Config`]: an Ignition configuration: read, written, merged, brought to another version
//! - [`report`]: what is wrong, where, in a sentence

mod butane;
mod clc;
mod cloud_config;
mod config;
mod data_url;
mod etcd2;
mod files;
mod gzip;
mod kind;
mod node;
pub mod report;
mod rules;
mod shape;
mod text;
mod transpile;
mod v2;
mod v3;
mod version;

pub use clc::Platform;
pub use cloud_config::Addresses;
pub use config::Config;
pub use files::{Files, NoFiles, TreeEntry, TreeEntryKind};
pub use kind::Kind;
pub use node::Position;
pub use report::Report;
pub use text::TEXT_MAX;
pub use transpile::{Options, Transpiled, transpile};
pub use version::Version;
