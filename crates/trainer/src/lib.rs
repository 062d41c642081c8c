//! The trainer of `lowrank`: a run is one TOML file.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`config`] | what the file may say, how it is checked |
//! | [`adapter`], [`attach`] | from `[adapter]` to the settings of an adapter's folder; fresh, resumed and stored adapters |
//! | [`calibrate`] | what the data does to the layers, for adapters that start from it |
//! | [`data`] | records to batches |
//! | [`task`], [`causal`], [`classification`] | what the loop needs of a task: model, batches, evaluation; and the tasks there are |
//! | [`session`] | device, model, tokenizer and adapter of a run |
//! | [`step`] | one forward and backward pass, segment by segment |
//! | [`update`], [`loss_scale`] | one optimiser step; the scale of the loss in f16 |
//! | [`train_loop`], [`rates`] | the loop on one page; learning rates |
//! | [`plan`], [`memory`], [`shortage`] | how much memory a run will need; how much it takes; what is said when there is none left |
//! | [`analysis`] | what training did to a model, in numbers |
//! | [`checkpoint`] | everything a resume needs |
//! | [`evaluate`] | loss and exact match on held-out data |
//! | [`run_dir`], [`metrics`], [`tensorboard`], [`progress`] | what a run leaves behind and shows |
//! | [`study`] | comparison of runs: studies, statistics, report |
//! | [`commands`] | one file per subcommand |

pub mod adapter;
pub mod analysis;
pub mod attach;
pub mod calibrate;
pub mod causal;
pub mod checkpoint;
pub mod classification;
pub mod cli;
pub mod commands;
pub mod config;
pub mod data;
pub mod device;
pub mod error;
pub mod evaluate;
pub mod loss_scale;
pub mod memory;
pub mod metrics;
pub mod optimizer;
pub mod plan;
pub mod progress;
pub mod rates;
pub mod run_dir;
pub mod scores;
pub mod session;
pub mod shortage;
pub mod step;
pub mod study;
pub mod task;
pub mod tensorboard;
pub mod train_loop;
pub mod update;
