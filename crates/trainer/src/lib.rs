//! The trainer of `lowrank`: a run is one TOML file.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`config`] | what the file may say, how it is checked |
//! | [`data`] | records to batches |
//! | [`session`] | device, model, tokenizer and adapter of a run |
//! | [`step`] | one forward and backward pass, segment by segment |
//! | [`train_loop`] | the loop on one page |
//! | [`checkpoint`] | everything a resume needs |
//! | [`evaluate`] | loss and exact match on held-out data |
//! | [`run_dir`], [`metrics`], [`tensorboard`], [`progress`] | what a run leaves behind and shows |
//! | [`commands`] | one file per subcommand |

pub mod checkpoint;
pub mod cli;
pub mod commands;
pub mod config;
pub mod data;
pub mod device;
pub mod error;
pub mod evaluate;
pub mod metrics;
pub mod optimizer;
pub mod progress;
pub mod run_dir;
pub mod session;
pub mod step;
pub mod tensorboard;
pub mod train_loop;
