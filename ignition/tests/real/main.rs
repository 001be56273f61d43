//! The library against the real things: Butane, the Container Linux Config Transpiler, Ignition and coreos-cloudinit judge
//! what it says, and Debian's Ignition writes what it puts out. `./devtool setup` builds and unpacks them; writing trees takes
//! root, because Ignition gives files to their owners.
//!
//! - [`tools`]: where the real programs are
//! - [`oracle`]: the real libraries, asked by the hundred
//! - [`debian`]: the real `ignition-validate`
//! - [`tree`]: what the real `ignition` writes
//! - [`expectation`]: whether a tree is what a configuration said
//! - [`same`]: whether two configurations mean the same
//! - [`library`]: the library that is tried
//! - [`corpus`]: the configurations that all of it runs over
//! - [`readme`]: the configurations that README.md shows

#![allow(clippy::expect_used)] // a trial whose tools fail has failed

mod accounts;
mod contents;
mod corpus;
mod debian;
mod expectation;
mod library;
mod oracle;
mod readme;
mod same;
mod tools;
mod tree;

mod trials;
