//! `lowrank-train generate`: answers to a prompt, or to every line of standard input, shown as they appear.

use std::io::{BufRead, Write};

use lowrank_models::generate::{Sampling, generate};
use serde_json::{Value, json};

use crate::cli::GenerateArgs;
use crate::config::Task;
use crate::error::Problem;
use crate::session::Session;

/// Runs the command.
///
/// # Errors
/// A model or adapter that cannot be used; a prompt that cannot be encoded.
pub fn run(args: &GenerateArgs) -> anyhow::Result<()> {
    let config = super::configuration(&args.config)?;
    if config.task != Task::CausalLm {
        let what = format!("task is \"{}\", and a classifier writes no text", config.task.name());
        return Err(Problem::config(what).hint("lowrank-train eval gives its scores").into());
    }
    let session = super::open(&config, &args.model, args.device.device.as_deref(), args.device.dtype)?;
    let mut collected = String::new();
    match &args.prompt {
        Some(prompt) => answer(&session, args, prompt, &mut collected)?,
        None => {
            for line in std::io::stdin().lock().lines() {
                let line = line.map_err(|error| Problem::run("cannot read standard input").source(error))?;
                if !line.trim().is_empty() {
                    answer(&session, args, &line, &mut collected)?;
                }
            }
        }
    }
    match &args.out {
        Some(path) => Ok(super::deliver(&collected, Some(path))?),
        None => Ok(()),
    }
}

/// Answers one prompt: streams to standard output, or adds to `collected` where `--out` is given.
fn answer(session: &Session, args: &GenerateArgs, prompt: &str, collected: &mut String) -> Result<(), Problem> {
    let ids = encode(session, args, prompt)?;
    let sampling =
        Sampling { temperature: args.temperature, top_p: args.top_p, top_k: args.top_k as usize, seed: args.seed };
    let mut stream = session.tokenizer.decode_stream(true);
    let mut problem = None;
    let emit = |text: &str, collected: &mut String| match args.out.is_some() {
        true => {
            collected.push_str(text);
            true
        }
        // A closed pipe (`| head`) ends the answer quietly.
        false => std::io::stdout().write_all(text.as_bytes()).and_then(|()| std::io::stdout().flush()).is_ok(),
    };
    let stop = session.tokenizer.eos_ids();
    generate(&session.decoder, &[ids], args.max_new_tokens as usize, stop, &sampling, |_, id| match stream.push(id) {
        Ok(text) => emit(&text, collected),
        Err(error) => {
            problem = Some(Problem::run("cannot decode the answer").source(error));
            false
        }
    });
    if let Some(problem) = problem {
        return Err(problem);
    }
    let rest = stream.finish().map_err(|error| Problem::run("cannot decode the answer").source(error))?;
    emit(&format!("{rest}\n"), collected);
    Ok(())
}

fn encode(session: &Session, args: &GenerateArgs, prompt: &str) -> Result<Vec<u32>, Problem> {
    let failed = |error| Problem::run("cannot encode the prompt").source(error);
    let (true, Some(chat)) = (!args.raw, &session.chat) else {
        if args.system.is_some() {
            return Err(Problem::config("--system needs a chat template, which this model does not have"));
        }
        return session.tokenizer.encode(prompt, true).map_err(failed);
    };
    let mut messages: Vec<Value> = vec![];
    if let Some(system) = &args.system {
        messages.push(json!({ "role": "system", "content": system }));
    }
    messages.push(json!({ "role": "user", "content": prompt }));
    let text = chat.render(&messages, true).map_err(failed)?;
    session.tokenizer.encode(&text, false).map_err(failed)
}
