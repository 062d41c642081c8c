//! Held-out loss, and exact match of generated answers.

use burn::tensor::{FloatDType, Int, Tensor, TensorData};
use lowrank_kernels as kernels;
use lowrank_models::generate::{Sampling, generate};
use lowrank_models::{Batch, Decoder, Inputs};

use crate::config::EvaluationConfig;
use crate::data::{DataConfig, Evaluation, Prompt, Record, read_records};
use crate::error::Problem;
use crate::session::Session;

/// Sequences that are answered at the same time.
const ANSWER_BATCH: usize = 32;

/// Sum of the losses of a batch's counted tokens, without a tape.
pub fn batch_loss(decoder: &Decoder, batch: &Batch, head_chunk_tokens: usize) -> f64 {
    let device = decoder.device();
    let inputs = Inputs::new(batch, &decoder.config, 0, &device);
    let hidden = decoder.hidden(&inputs, None);
    let counted: Vec<i32> = (0..batch.targets.len() as i32).filter(|&i| batch.targets[i as usize] >= 0).collect();
    let head = decoder.head();
    let softcap = decoder.config.final_softcap.unwrap_or(0.0);
    let mut sum = 0.0;
    for chunk in counted.chunks(head_chunk_tokens.max(1)) {
        let rows = Tensor::<1, Int>::from_data(TensorData::new(chunk.to_vec(), [chunk.len()]), &device);
        let targets: Vec<i32> = chunk.iter().map(|&row| batch.targets[row as usize]).collect();
        let targets = Tensor::<1, Int>::from_data(TensorData::new(targets, [chunk.len()]), &device);
        let logits = head.forward(hidden.clone().select(0, rows), &decoder.config, false);
        let losses = kernels::cross_entropy(logits, targets, softcap).cast(FloatDType::F32).into_data();
        sum += losses.iter::<f32>().map(f64::from).sum::<f64>();
    }
    sum
}

/// Mean loss over the counted tokens of a data set, and their number.
pub fn loss(
    decoder: &Decoder,
    data: &Evaluation,
    head_chunk_tokens: usize,
    mut done: impl FnMut(u64, u64),
) -> (f64, u64) {
    let total = data.len() as u64;
    let (mut sum, mut tokens) = (0.0, 0u64);
    for (index, batch) in data.batches().enumerate() {
        sum += batch_loss(decoder, &batch, head_chunk_tokens);
        tokens += batch.target_count() as u64;
        done(index as u64 + 1, total);
    }
    (sum / tokens.max(1) as f64, tokens)
}

/// A question with its expected answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// Prompt ids.
    pub prompt: Vec<u32>,
    /// The answer that counts as right, trimmed.
    pub answer: String,
}

/// The questions of the records in these files.
///
/// # Errors
/// Unreadable files or records that cannot be encoded.
pub fn questions(session: &Session, entries: &[String], data: &DataConfig) -> Result<Vec<Question>, Problem> {
    let records =
        read_records(entries, data).map_err(|error| Problem::run("cannot read the questions").source(error))?;
    records.iter().filter_map(|located| question(session, &located.record).transpose()).collect()
}

fn question(session: &Session, record: &Record) -> Result<Option<Question>, Problem> {
    let Some((prompt, answer)) = record.question() else { return Ok(None) };
    let failed = |error| Problem::run("cannot encode a prompt").source(error);
    let prompt = match prompt {
        Prompt::Text(text) => session.tokenizer.encode(&text, true).map_err(failed)?,
        Prompt::Chat { messages, tools } => {
            let Some(chat) = &session.chat else {
                return Err(Problem::config("the records are conversations, but the model has no chat template"));
            };
            let text = chat.render_with_tools(&messages, true, &tools).map_err(failed)?;
            session.tokenizer.encode(&text, false).map_err(failed)?
        }
    };
    Ok(Some(Question { prompt, answer: answer.trim().to_owned() }))
}

/// What generation made of a list of questions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answers {
    /// Questions that were answered.
    pub total: u64,
    /// Answers equal to the reference after trimming.
    pub right: u64,
    /// The first answer that was wrong: expected and given.
    pub first_wrong: Option<(String, String)>,
}

impl Answers {
    /// Share of right answers.
    pub fn exact_match(&self) -> f64 {
        self.right as f64 / self.total.max(1) as f64
    }
}

/// Answers the questions greedily and compares with the references.
///
/// # Errors
/// The tokenizer cannot decode an answer.
pub fn exact_match(
    session: &Session,
    questions: &[Question],
    config: &EvaluationConfig,
    mut done: impl FnMut(u64, u64),
) -> Result<Answers, Problem> {
    let count = config.num_samples.unwrap_or(questions.len()).min(questions.len());
    // Equal lengths together: less padding. The answers do not depend on their neighbours.
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by_key(|&index| (questions[index].prompt.len(), index));
    let mut answers = Answers::default();
    for batch in order.chunks(ANSWER_BATCH) {
        let prompts: Vec<Vec<u32>> = batch.iter().map(|&index| questions[index].prompt.clone()).collect();
        let stop = session.tokenizer.eos_ids();
        let out = generate(&session.decoder, &prompts, config.max_new_tokens, stop, &Sampling::default(), |_, _| true);
        for (&index, ids) in batch.iter().zip(out) {
            let text = session
                .tokenizer
                .decode(&ids, true)
                .map_err(|error| Problem::run("cannot decode an answer").source(error))?;
            let expected = &questions[index].answer;
            answers.total += 1;
            if text.trim() == expected {
                answers.right += 1;
            } else if answers.first_wrong.is_none() {
                answers.first_wrong = Some((expected.clone(), text.trim().to_owned()));
            }
        }
        done(answers.total, count as u64);
    }
    Ok(answers)
}
