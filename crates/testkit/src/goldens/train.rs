//! Training runs: checkpoint and adapter files in, the trainer's own optimiser step, adapter files out.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lowrank_core::optim::adamw::StepRule;
use lowrank_core::optim::{AdamForm, AdamWConfig, Galore, GaloreConfig, Optimizer, ProjType, RuleConfig};
use lowrank_models::adapters::{self, Attached, FileForm};
use lowrank_models::hf::AdapterConfig;
use lowrank_models::hf::peft::{AdapterTensor, KeyForm, Modules, Part};
use lowrank_models::save::host_values;
use lowrank_models::{NetworkBatch as _, parameters};
use lowrank_train::evaluate::batch_loss;
use lowrank_train::step::{Accumulated, Pass, StepOptions};
use lowrank_train::train_loop::{StepPlan, optimizer_step};

use super::case::{AccumMean, Case, GaloreSide, Train};
use super::checks::{Checks, distance, norm};
use super::forward::Limits;
use super::subject::{Subject, values};
use super::tensors::{self, Tensors, Values};
use super::{Options, Stop, failed, start};

/// A gradient's error may be this share of its tensor's norm, and this share of the whole gradient's: where the exact
/// gradient of a tensor is zero (a bias of the keys), there is nothing but rounding.
const GRADIENT_LIMITS: (f64, f64) = (1e-3, 1e-6);

/// A case while it runs.
struct Run<'a, M: Subject> {
    case: &'a Case,
    train: &'a Train,
    folder: &'a Path,
    options: &'a Options,
    limits: Limits,
    step_options: StepOptions,
    model: M,
    adapter: Option<(AdapterConfig, Attached)>,
    batches: Vec<M::Batch>,
    expected: Tensors,
}

/// Runs a training case.
///
/// # Errors
/// Files that cannot be used.
pub fn run<M: Subject>(case: &Case, folder: &Path, options: &Options, checks: &mut Checks) -> Result<(), Stop> {
    let Some(train) = &case.train else { return Err(failed("the case has no settings of training")) };
    let mut model = M::load(case, folder, options)?;
    let adapter = match case.is_full() {
        true => {
            model = parameters::set_trained(model, |_| Some(true));
            None
        }
        false => Some(start::attach(case, &mut model)?),
    };
    let step_options = StepOptions {
        checkpointing: options.checkpointing,
        head_chunk_tokens: options.head_chunk_tokens.unwrap_or(model.default_head_chunk()),
        seed: 0,
    };
    let mut run = Run {
        limits: Limits::of(case, options)?,
        batches: batches::<M>(case, train)?,
        expected: case.tensors()?,
        case,
        train,
        folder,
        options,
        step_options,
        model,
        adapter,
    };
    run.check_start(checks)?;
    run.check_first_gradients(checks);
    run.check_steps(checks)?;
    run.check_end(checks)
}

/// All micro batches, in order.
fn batches<M: Subject>(case: &Case, train: &Train) -> Result<Vec<M::Batch>, Stop> {
    let tensors = tensors::read(&case.folder.join(&case.batches))?;
    let wanted = train.steps * train.grad_accum;
    let first = tensors.get("input_ids").map_or_else(|| tensors::get(&tensors, "labels"), Ok)?;
    match first.shape.as_slice() {
        &[count, height, ..] if count >= wanted => {
            (0..wanted).map(|index| M::batch(&tensors, index * height, height)).collect()
        }
        shape => Err(failed(format!("the batches have the shape {shape:?}: expected [{wanted}, batch, ..]"))),
    }
}

impl<M: Subject> Run<'_, M> {
    /// The micro batches of a step with what their losses are divided by.
    fn step_batches(&self, step: usize) -> (&[M::Batch], Vec<f64>) {
        let accum = self.train.grad_accum;
        let batches = &self.batches[step * accum..(step + 1) * accum];
        let counts: Vec<f64> = batches.iter().map(|batch| batch.target_count() as f64).collect();
        let denominators = match self.train.accum_mean {
            AccumMean::Tokens => vec![counts.iter().sum(); accum],
            AccumMean::MicroBatches => counts.iter().map(|count| count * accum as f64).collect(),
        };
        (batches, denominators)
    }

    /// A parameter's name in the files, and whether it lies there with its axes swapped.
    fn stored(&self, name: &str) -> (String, bool) {
        let plain = AdapterConfig::new(1, 1.0, Modules::AllLinear);
        let config = self.adapter.as_ref().map_or(&plain, |(config, _)| config);
        let form = FileForm::new(&self.model, config);
        let key = self.adapter.as_ref().and_then(|_| form.key(name)).unwrap_or_else(|| name.to_owned());
        (key, form.is_flipped(name))
    }

    fn key_form(&self) -> KeyForm {
        self.adapter.as_ref().map_or(KeyForm::Peft, |(config, _)| config.method.key_form())
    }

    /// Loss and logits on the first batch.
    fn check_first_batch(&self, what: &str, loss: Option<f64>, logits_limit: f64, checks: &mut Checks) {
        let batch = &self.batches[0];
        if let Some(expected) = loss {
            let sum = batch_loss(&self.model, batch, self.step_options.head_chunk_tokens);
            let got = sum / batch.target_count().max(1) as f64;
            let own = if what == "init" { self.first_loss_limit() } else { self.loss_limit() };
            let note = || format!("expected {expected}, got {got}");
            checks.add(&format!("loss_{what}"), (got - expected).abs(), self.limits.loss(own, expected), note);
        }
        if let Some(expected) = self.expected.get(&format!("logits_{what}")) {
            let positions: usize = expected.shape[expected.shape.len() - 2];
            let got = self.model.reference_logits(batch, positions);
            let limit = self.limits.values(logits_limit, &expected.data);
            checks.largest(&format!("logits_{what}"), &expected.data, &got, limit);
        }
    }

    fn loss_limit(&self) -> f64 {
        self.case.limit("loss_abs").unwrap_or(2e-5)
    }

    fn first_loss_limit(&self) -> f64 {
        let own = self.case.limit("loss_abs_step1");
        own.unwrap_or_else(|| if self.case.limit("loss_abs").is_some() { self.loss_limit() } else { 1e-5 })
    }

    fn check_start(&self, checks: &mut Checks) -> Result<(), Stop> {
        if let Some(expected) = self.case.trainable_parameters {
            let trained = parameters::trained(&self.model);
            let count: usize = trained.iter().map(|(_, dims)| dims.iter().product::<usize>()).sum();
            checks.equal("trainable_parameters", &expected, &count);
        }
        self.check_first_batch("init", self.case.expected.initial_loss_batch0, 1e-4, checks);
        if let (Some((config, _)), None) = (&self.adapter, self.limits.relative) {
            let base = M::load(self.case, self.folder, self.options)?;
            start::check_own(self.case, config, base, &self.model, self.step_options, checks)?;
        }
        Ok(())
    }

    /// The accumulated gradient of the first step, tensor by tensor.
    fn check_first_gradients(&mut self, checks: &mut Checks) {
        const MARK: &str = "grad_step1.";
        let expected: BTreeMap<String, Values> = self
            .expected
            .iter()
            .filter_map(|(key, values)| Some((key.strip_prefix(MARK)?.to_owned(), values.clone())))
            .collect();
        let share = match self.limits.relative {
            None => GRADIENT_LIMITS.0,
            Some(relative) => 50.0 * relative,
        };
        if expected.is_empty() || share > 0.1 {
            return; // in bf16 single tensors are too coarse: the norm of all has to do
        }
        let (batches, denominators) = self.step_batches(0);
        let (batches, mut accumulated) = (batches.to_vec(), Accumulated::default());
        let mut optimizer = Optimizer::adamw(AdamWConfig::default());
        let mut pass = Pass::new(&mut self.model, self.step_options);
        for (index, batch) in batches.iter().enumerate() {
            pass.run(batch, denominators[index], index as u64, &mut accumulated, &mut optimizer, None);
        }
        let whole = norm(expected.values().flat_map(|values| values.data.iter().copied()));
        let mut got: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        for (name, gradient) in accumulated.gradients {
            let (key, flipped) = self.stored(&name);
            got.insert(key, host_values(if flipped { gradient.transpose() } else { gradient }));
        }
        for (key, expected) in &expected {
            // peft's names in memory differ from those in its files for modules that are trained whole.
            let tensor = AdapterTensor::from_key(key, self.key_form());
            let key = tensor.map_or_else(|| key.clone(), |tensor| tensor.key(self.key_form()));
            let own = norm(expected.data.iter().copied());
            let limit = (share * own + GRADIENT_LIMITS.1 * whole) / own.max(f64::MIN_POSITIVE);
            let Some(got) = got.get(&key).filter(|got| got.len() == expected.data.len()) else {
                let is_zero = own == 0.0; // B = 0 makes the gradient of A vanish: an absent one is as good
                checks.add("grad_step1", if is_zero { 0.0 } else { f64::INFINITY }, limit, || {
                    format!("{key} is missing")
                });
                continue;
            };
            let error = distance(got, &expected.data) / own.max(f64::MIN_POSITIVE);
            checks.add("grad_step1", error, limit, || format!("{key}, relative to its norm {own:.3e}"));
        }
    }

    /// The optimiser of the case. GaLore runs its published algorithm on the linear layers of the blocks.
    fn optimizer(&mut self) -> Result<Optimizer, Stop> {
        let settings = &self.train.optimizer;
        let plain = AdamWConfig { betas: settings.betas, eps: settings.eps, form: AdamForm::Torch };
        let Some(galore) = self.case.galore()? else { return Ok(Optimizer::adamw(plain)) };
        let form = AdamForm::Hf;
        let mut optimizer = Optimizer::adamw(AdamWConfig { form, ..plain });
        let config = GaloreConfig {
            rank: galore.rank,
            update_proj_gap: galore.update_proj_gap,
            scale: galore.scale,
            proj_type: match galore.proj_type {
                GaloreSide::Std => ProjType::Std,
                GaloreSide::ReverseStd => ProjType::ReverseStd,
                GaloreSide::Right => ProjType::Input,
                GaloreSide::Left => ProjType::Output,
                GaloreSide::Full => ProjType::Full,
            },
            exact: true,
            align_sign: false,
            rule: RuleConfig::AdamW { betas: settings.betas, eps: settings.eps, form },
            ..GaloreConfig::default()
        };
        self.model.for_each_projection(&mut |module, projection| {
            if module != "lm_head" {
                let name = format!("{module}.weight");
                let method = Galore::new(config.clone(), &name, 0, projection.dims(), 0);
                optimizer.manage(&name, Box::new(method));
            }
        });
        Ok(optimizer)
    }

    /// All steps: losses before each update and gradient norms before clipping.
    fn check_steps(&mut self, checks: &mut Checks) -> Result<(), Stop> {
        let train = self.train;
        let schedule = train.schedule()?;
        let optimizer = &train.optimizer;
        let mut state = self.optimizer()?;
        for step in 0..train.steps {
            let learning_rate = optimizer.lr * schedule.factor(step);
            let rule = |_: &str, _: bool, gradient_scale| StepRule {
                learning_rate,
                weight_decay: optimizer.weight_decay,
                gradient_scale,
            };
            let (batches, denominators) = self.step_batches(step);
            let batches = batches.to_vec();
            let max_grad_norm = train.max_grad_norm.unwrap_or(0.0);
            let plan = StepPlan {
                options: self.step_options,
                step: step as u64,
                max_grad_norm,
                denominators: &denominators,
                first_key: (step * train.grad_accum) as u64,
                rule: &rule,
                immediate: self.options.immediate && batches.len() == 1 && max_grad_norm == 0.0,
            };
            let report = optimizer_step(&mut self.model, &mut state, &batches, &plan);
            self.check_step(step, report.loss, report.grad_norm, checks);
        }
        Ok(())
    }

    fn check_step(&self, step: usize, loss: f64, grad_norm: f64, checks: &mut Checks) {
        let at = |expected: f64, got: f64| move || format!("step {}: expected {expected}, got {got}", step + 1);
        if let Some(&expected) = self.case.expected.losses.get(step) {
            let (what, own) = match step {
                0 => ("first loss", self.first_loss_limit()),
                _ => ("losses", self.loss_limit()),
            };
            checks.add(what, (loss - expected).abs(), self.limits.loss(own, expected), at(expected, loss));
        }
        if let Some(&expected) = self.case.expected.grad_norms.get(step) {
            let own = self.case.limit("grad_norm_rel").unwrap_or(1e-4);
            let limit = self.limits.relative.map_or(own, |relative| own.max(10.0 * relative));
            checks.add("grad_norms", (grad_norm - expected).abs() / expected, limit, at(expected, grad_norm));
        }
    }

    fn check_end(&self, checks: &mut Checks) -> Result<(), Stop> {
        let logits_limit = self.case.limit("final_logits_abs").unwrap_or(1e-4);
        self.check_first_batch("final", self.case.expected.final_loss_batch0, logits_limit, checks);
        match &self.adapter {
            Some((config, attached)) => {
                self.check_adapter(config, attached, checks)?;
                self.check_round_trip(config, attached, checks)?;
                self.check_merged(checks)
            }
            None => self.check_weights(checks),
        }
    }

    /// The trained adapter against `adapter_final`: names, shapes, values.
    fn check_adapter(&self, config: &AdapterConfig, attached: &Attached, checks: &mut Checks) -> Result<(), Stop> {
        let last = self.case.folder.join("adapter_final/adapter_model.safetensors");
        if !last.is_file() {
            return Ok(());
        }
        let last = without_base(tensors::read(&last)?);
        let first = without_base(tensors::read(&self.case.folder.join("adapter_init/adapter_model.safetensors"))?);
        let mut got = values(adapters::adapter_tensors(&self.model, config, attached));
        if config.method.doubles_rank() {
            let converted = self.case.folder.join("adapter_final_converted/adapter_model.safetensors");
            if converted.is_file() {
                let converted = tensors::read(&converted)?;
                checks.equal("names and shapes of the converted adapter", &shapes(&converted), &shapes(&got));
            }
            got = start::first_halves(&got);
        }
        checks.equal("names and shapes of the adapter", &shapes(&last), &shapes(&got));
        self.check_final(&first, &last, &got, checks);
        Ok(())
    }

    /// The trained model against `final.safetensors`.
    fn check_weights(&self, checks: &mut Checks) -> Result<(), Stop> {
        let last = self.case.folder.join("final.safetensors");
        if !last.is_file() {
            return Ok(());
        }
        let last = tensors::read(&last)?;
        let first = M::stored_base(self.case, self.folder, self.options)?;
        let got = values(self.model.stored_tensors());
        let shared = last.keys().filter(|name| got.contains_key(*name)).count();
        checks.equal("number of the model's tensors", &last.len(), &shared);
        self.check_final(&first, &last, &got, checks);
        Ok(())
    }

    /// Distance to the reference, relative to how far training went, over all tensors together.
    fn check_final(&self, first: &Tensors, last: &Tensors, got: &Tensors, checks: &mut Checks) {
        if self.limits.relative.is_some() {
            return; // Adam turns rounding of tiny gradients into whole steps
        }
        let (mut off, mut moved, mut worst) = (0.0, 0.0, (0.0, ""));
        for (name, last) in last {
            let (Some(got), Some(first)) = (got.get(name), first.get(name)) else { continue };
            let error = distance(&got.data, &last.data);
            off += error.powi(2);
            moved += distance(&last.data, &first.data).powi(2);
            worst = if error > worst.0 || error.is_nan() { (error, name.as_str()) } else { worst };
        }
        let limit = self.case.limit("final_rel_l2_all").unwrap_or(1e-4);
        let note = || format!("most of it in {}: {:.3e}", worst.1, worst.0);
        checks.add("final tensors", off.sqrt() / moved.sqrt().max(f64::MIN_POSITIVE), limit, note);
    }

    /// Writes the adapter and reads it again on a fresh base.
    fn check_round_trip(&self, config: &AdapterConfig, attached: &Attached, checks: &mut Checks) -> Result<(), Stop> {
        let folder = tempfile::tempdir().map_err(failed)?;
        let base = config.base_model_name_or_path.as_deref().unwrap_or_default();
        adapters::save_adapter(&self.model, config, attached, base, folder.path()).map_err(failed)?;
        let written = tensors::read(&folder.path().join("adapter_model.safetensors"))?;
        let held = values(adapters::adapter_tensors(&self.model, config, attached));
        checks.equal("written adapter", &true, &(written == held));
        let mut fresh = M::load(self.case, self.folder, self.options)?;
        let (read, _) = adapters::load_adapter(&mut fresh, folder.path()).map_err(failed)?;
        checks.equal(
            "adapter read again",
            &true,
            &(values(adapters::adapter_tensors(&fresh, config, attached)) == held),
        );
        let settings = |config: &AdapterConfig| {
            let rank_and_alpha = (config.r, config.lora_alpha, config.use_rslora);
            attached.modules.iter().map(|m| (rank_and_alpha, config.rank_of(m), config.alpha_of(m))).collect::<Vec<_>>()
        };
        checks.equal("adapter configuration read again", &settings(config), &settings(&read));
        Ok(())
    }

    /// `merged.*`: weights with the trained delta added.
    fn check_merged(&self, checks: &mut Checks) -> Result<(), Stop> {
        const MARK: &str = "merged.";
        if self.limits.relative.is_some() || !self.expected.keys().any(|key| key.starts_with(MARK)) {
            return Ok(());
        }
        let mut merged = self.model.clone();
        adapters::merge(&mut merged);
        let got = values(merged.stored_tensors());
        let base = M::stored_base(self.case, self.folder, self.options)?;
        for (key, expected) in &self.expected {
            let Some(name) = key.strip_prefix(MARK) else { continue };
            let got = got.get(name).filter(|got| got.shape == expected.shape);
            let Some(got) = got else {
                checks.add("merged weights", f64::INFINITY, 0.0, || format!("{name} is missing or of another shape"));
                continue;
            };
            // The delta is as far off as the factors may be, and the sum is rounded once.
            let base = &tensors::get(&base, name)?.data;
            let (size, delta) = (norm(expected.data.iter().copied()), distance(&expected.data, base));
            let limit = 10.0 * self.case.limit("final_rel_l2_all").unwrap_or(1e-4) * delta + 1e-6 * size;
            checks.add("merged weights", distance(&got.data, &expected.data) / size, limit / size, || name.to_owned());
        }
        Ok(())
    }
}

fn shapes(tensors: &Tensors) -> BTreeSet<(&str, &[usize])> {
    tensors.iter().map(|(name, values)| (name.as_str(), values.shape.as_slice())).collect()
}

/// peft stores the base's weight beside the factors of an embedding; it is not part of the adapter.
fn without_base(mut tensors: Tensors) -> Tensors {
    tensors.retain(|name, _| {
        !matches!(AdapterTensor::from_key(name, KeyForm::Peft), Some(AdapterTensor { part: Part::BaseCopy, .. }))
    });
    tensors
}
