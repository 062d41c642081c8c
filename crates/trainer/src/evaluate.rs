//! Held-out loss, exact match of generated answers, and scores of classifiers.

use burn::tensor::FloatDType;
use lowrank_models::classifier::{Classifier, Labels};
use lowrank_models::generate::{Sampling, generate};
use lowrank_models::network::{Network, integers};
use lowrank_models::save::host_values;
use lowrank_models::{ClassifierBatch, Decoder};

use crate::config::EvaluationConfig;
use crate::data::{DataConfig, DataError, Evaluation, LabelledEvaluation, Prompt, Record, read_records};
use crate::error::Problem;
use crate::scores;
use crate::session::Session;
use crate::task::Evaluated;

/// Sequences that are answered at the same time.
const ANSWER_BATCH: usize = 32;

/// Sum of the losses of a batch's counted rows, without a tape.
pub fn batch_loss<M: Network>(model: &M, batch: &M::Batch, head_chunk: usize) -> f64 {
    let device = model.device();
    let hidden = model.last_hidden(&model.inputs(batch));
    let head = model.head();
    let mut sum = 0.0;
    for chunk in model.counted(batch).chunks(head_chunk.max(1)) {
        let x = hidden.clone().select(0, integers(chunk, &device));
        let losses = model.losses(&head, x, chunk, batch, false).cast(FloatDType::F32).into_data();
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

/// Mean loss and scores of a classifier over a data set.
///
/// # Errors
/// An image cannot be read.
pub fn classes(
    model: &Classifier,
    data: &LabelledEvaluation,
    head_chunk: usize,
    mut done: impl FnMut(u64, u64),
) -> Result<Evaluated, DataError> {
    let total = data.len() as u64;
    let mut judged = Judged::default();
    for (index, batch) in data.batches()?.enumerate() {
        judged.add(model, &batch?, head_chunk);
        done(index as u64 + 1, total);
    }
    let Judged { loss, count, classes, values } = judged;
    let scores = match values.0.is_empty() {
        true => scores::of_classes(&classes.0, &classes.1, model.num_labels()),
        false => scores::of_values(&values.0, &values.1),
    };
    Ok(Evaluated { loss: loss / count.max(1) as f64, count, scores, ..Evaluated::default() })
}

/// What a classifier said so far.
#[derive(Default)]
struct Judged {
    /// Summed loss.
    loss: f64,
    /// Rows with a label.
    count: u64,
    /// Expected and predicted classes.
    classes: (Vec<i32>, Vec<i32>),
    /// Expected and predicted values.
    values: (Vec<f64>, Vec<f64>),
}

impl Judged {
    fn add(&mut self, model: &Classifier, batch: &ClassifierBatch, head_chunk: usize) {
        let hidden = model.last_hidden(&model.inputs(batch));
        let (head, rows, labelled) = (model.head(), model.counted(batch), batch.labels.counted());
        self.count += rows.len() as u64;
        let chunk = head_chunk.max(1);
        for (rows, labelled) in rows.chunks(chunk).zip(labelled.chunks(chunk)) {
            let x = hidden.clone().select(0, integers(rows, &model.device()));
            let losses = model.losses(&head, x.clone(), rows, batch, false).cast(FloatDType::F32).into_data();
            self.loss += losses.iter::<f32>().map(f64::from).sum::<f64>();
            let logits = host_values(head.forward(x, &model.config, false));
            for (logits, &row) in logits.chunks(model.num_labels()).zip(labelled) {
                match &batch.labels {
                    Labels::Classes(classes) => {
                        self.classes.0.push(classes[row]);
                        self.classes.1.push(largest(logits));
                    }
                    Labels::Values(values) => {
                        self.values.0.push(f64::from(values[row]));
                        self.values.1.push(f64::from(logits[0]));
                    }
                }
            }
        }
    }
}

/// Number of the largest logit.
fn largest(logits: &[f32]) -> i32 {
    let best = logits.iter().enumerate().max_by(|(_, a), (_, b)| a.total_cmp(b));
    best.map_or(0, |(class, _)| class as i32)
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
