//! `lowrank-bench logits`: the logits of one sequence as safetensors, for the interoperability check.

use std::path::{Path, PathBuf};

use lowrank_models::hf::{Dtype, OutTensor, write_safetensors};
use lowrank_models::{Batch, Inputs, save};
use lowrank_train::config::{Dtype as RunDtype, ProgressStyle};
use lowrank_train::session::Session;

#[derive(clap::Args)]
pub struct Arguments {
    #[arg(long)]
    model: String,
    #[arg(long)]
    adapter: Option<PathBuf>,
    #[arg(long, value_delimiter = ',')]
    ids: Vec<i32>,
    #[arg(long)]
    out: PathBuf,
}

pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments { model, adapter, ids, out } = arguments;
    write(&model, adapter, ids, &out)
}

fn write(model: &str, adapter: Option<PathBuf>, ids: Vec<i32>, out: &Path) -> anyhow::Result<()> {
    let mut session = Session::open(model, "cpu", RunDtype::F32, ProgressStyle::None)?;
    if let Some(folder) = adapter {
        session.load_adapter(&folder)?;
    }
    let row = Batch::from_rows(&[ids], &[], None);
    let inputs = Inputs::new(&row, &session.decoder.config, 0, &session.device.device);
    let logits = session.decoder.logits(session.decoder.hidden(&inputs, None));
    let dims = logits.dims();
    let tensor = OutTensor::from_f32("logits", Dtype::F32, &dims, save::host_values(logits));
    Ok(write_safetensors(out, vec![tensor], &[])?)
}
