//! `lowrank-train compare`: variants of a run beside each other, with their spread over seeds.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`mod@file`] | a study file: what may be in it, and the configuration of every run (`variant`) |
//! | [`run`] | runs as processes of their own: state of a folder, start, stop, failure |
//! | [`plan`] | what is run in which order: the search for the rate, the other seeds, the scores on test data (`work`) |
//! | [`read`], [`group`] | run folders, of a study or not, and which of them differ only in the seed |
//! | [`metric`], [`stats`] | what is compared, mean, standard error, ties |
//! | [`report`] | rows of the report |
//! | [`table`], [`html`], [`charts`], [`pareto`], [`svg`] | terminal, Markdown, CSV, HTML with plots |

pub mod charts;
pub mod file;
pub mod group;
pub mod html;
pub mod metric;
pub mod pareto;
pub mod plan;
pub mod read;
pub mod report;
pub mod run;
pub mod stats;
pub mod svg;
pub mod table;
#[cfg(test)]
mod testing;
mod variant;
mod work;
