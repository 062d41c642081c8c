//! What a study becomes, and the text of every error.
#![allow(clippy::unwrap_used)]
use super::*;
use crate::config::AdapterConfig;

const STUDY: &str = r#"
output_dir = "runs/s"
seeds = [1, 2]
set = { training.micro_batch_size = 3 }

[base]
base_model = "m"
adapter = { lora = { r = 8, use_rslora = true } }
data = { train = "t.jsonl", val_set_size = 0.1 }
training = { max_steps = 5 }

[data]
validation = "v.jsonl"
test = ["x.jsonl", "y.jsonl"]

[[variant]]
name = "high"
set = { "adapter.lora.r" = 16, adapter.lora.lora_alpha = 4 }
learning_rates = [1e-3, 1]

[[variant]]
name = "other"
adapter.lora.lora_dropout = 0.1
optimizer = { adamw = { learning_rate = 0.5 } }

[[variant]]
name = "full"
adapter = {}
"#;

fn read(text: &str) -> Result<Study, String> {
    parse("s", "s.toml", text).map_err(|problem| match &problem.hint {
        Some(hint) => format!("{problem}\nhint: {hint}"),
        None => problem.to_string(),
    })
}

fn changed(from: &str, to: &str) -> String {
    assert!(STUDY.contains(from), "{from}");
    read(&STUDY.replace(from, to)).unwrap_err()
}

#[test]
fn variants_replace_tables_and_lay_keys_over() {
    let study = read(STUDY).unwrap();
    assert_eq!((study.grid_seed, study.jobs, study.keep, study.budget), (1, 1, Keep::Weights, Budget::Tokens));
    assert_eq!(study.test, Some(Paths::Many(vec!["x.jsonl".to_owned(), "y.jsonl".to_owned()])));
    let [high, other, full] = &study.variants[..] else { unreachable!() };
    assert_eq!((&high.rates[..], &other.rates[..], &full.rates[..]), (&[1e-3, 1.0][..], &[0.5][..], &[2e-4][..]));
    let Some(AdapterConfig::Lora(lora)) = &high.config.adapter else { unreachable!() };
    assert_eq!((lora.r, lora.lora_alpha, lora.use_rslora), (16, 4.0, true), "joined with the table of the base");
    let Some(AdapterConfig::Lora(lora)) = &other.config.adapter else { unreachable!() };
    assert_eq!((lora.r, lora.lora_dropout, lora.use_rslora), (8, 0.1, false), "in place of the table of the base");
    assert_eq!(full.config.adapter, None);
    assert!(study.variants.iter().all(|variant| variant.config.training.micro_batch_size == 3));
}

#[test]
fn every_run_has_its_rate_seed_folder_and_data() {
    let study = read(STUDY).unwrap();
    let run = study.run(&study.variants[0], 1e-3, 2).unwrap();
    assert_eq!(run.config.output_dir, Path::new("runs/s/runs/high/lr-1e-3/seed-2"));
    assert_eq!((run.config.seed, run.config.optimizer.common().learning_rate), (2, 1e-3));
    assert_eq!(run.config.training.resume_from_checkpoint, ResumeFrom::Newest(true));
    assert_eq!(run.config.data.eval, Some(Paths::One("v.jsonl".to_owned())));
    assert_eq!(run.config.data.val_set_size, ValSetSize::Count(0));
}

#[test]
fn a_base_may_be_a_file_and_a_variant_may_have_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("base.toml");
    let base = "base_model = \"f\"\n[data]\ntrain = \"t\"\n[training]\nmax_steps = 7\n";
    std::fs::write(&path, base).unwrap();
    let shown = path.to_string_lossy();
    let text = STUDY.replace("name = \"full\"", &format!("name = \"full\"\nbase = \"{shown}\""));
    let study = read(&text).unwrap();
    assert_eq!(
        (study.variants[0].config.training.max_steps, study.variants[2].config.training.max_steps),
        (Some(5), Some(7))
    );

    // An error in the base names the base, its line and its text.
    std::fs::write(&path, base.replace("max_steps", "max_stps")).unwrap();
    let error = read(&text).unwrap_err();
    assert!(
        error.starts_with(&format!(
            "{shown}, line 5, column 1: unknown key `max_stps` in [training]\n  5 | max_stps = 7\n"
        )),
        "{error}"
    );
    assert!(error.contains("hint: did you mean `max_steps`?"), "{error}");
    std::fs::remove_file(&path).unwrap();
    assert!(read(&text).unwrap_err().starts_with(&format!("cannot read the configuration file {shown}")));
}

#[test]
fn errors_name_the_line_and_the_key() {
    assert_eq!(
        changed("seeds = ", "seds = "),
        "s.toml, line 3, column 1: unknown key `seds` at the top level\n  3 | seds = [1, 2]\nhint: did you mean `seeds`? Valid keys \
         here: base, output_dir, seeds, grid_seed, metric, higher_is_better, budget, jobs, keep, set, data, variant"
    );
    assert_eq!(
        changed("learning_rates", "rates"),
        "s.toml, line 19, column 1: unknown key `rates` in [variant]\n  19 | rates = [1e-3, 1]\nhint: valid keys here: name, base, \
         set, adapter, optimizer, quantization, learning_rates"
    );
    let key = changed("\"adapter.lora.r\" = 16", "\"adapter.lora.rr\" = 16");
    assert!(key.starts_with("s.toml, line 18, column 23: unknown key `rr` in [adapter.lora]\n  18 | set = {"), "{key}");
    let value = changed("\"adapter.lora.r\" = 16", "\"adapter.lora.r\" = true");
    assert!(value.contains("line 18") && value.contains("`adapter.lora.r`: expected a whole number"), "{value}");
    let inline = changed("max_steps = 5", "max_stps = 5");
    assert!(inline.starts_with("s.toml, line 10, column 14: unknown key `max_stps` in [training]"), "{inline}");
    let table = changed("lora_dropout = 0.1", "lora_dropot = 0.1");
    assert!(table.starts_with("s.toml, line 23, column 14: unknown key `lora_dropot` in [adapter.lora]"), "{table}");
    let two = changed("adapter.lora.lora_alpha = 4", "adapter.mora.r = 4");
    assert!(two.contains("`adapter`: expected exactly one table below it"), "{two}");
    assert!(changed("seeds = [1, 2]", "seeds = 1").contains("`seeds`: expected a list"));
    assert!(
        changed("\"adapter.lora.r\" = 16", "\"adapter lora\" = 16")
            .contains("set holds `adapter lora`, which is not a key")
    );
    assert!(changed("seeds = [1, 2]", "seeds = [1, 2").contains("not valid TOML"));
}

#[test]
fn all_values_that_make_no_sense_are_listed() {
    let study = "seeds = [1, 1]\njobs = 0\n[[variant]]\nname = \"a/b\"\nlearning_rates = []\n[[variant]]\nlearning_rates = [0.0]\n";
    assert_eq!(
        read(study).unwrap_err(),
        "s.toml has 9 problems:\n  1. output_dir is missing: name the folder for the runs and the report\n  \
         2. seeds holds a seed twice\n  3. jobs is 0, must be at least 1\n  \
         4. variant `a/b`: the name is that of a folder too: letters, digits, spaces and - _ . + ( ) = only\n  \
         5. variant `a/b` has no base: name a configuration as base of the study or of the variant\n  \
         6. variant `a/b`: learning_rates is empty; leave it out to use the rate of its configuration\n  \
         7. variant 2 has no name\n  \
         8. variant 2 has no base: name a configuration as base of the study or of the variant\n  \
         9. variant 2: learning_rates holds 0, must be greater than 0"
    );
    assert_eq!(
        read("seeds = []\noutput_dir = \"o\"").unwrap_err(),
        "s.toml has 2 problems:\n  1. seeds is missing: list at least \
         one, for a standard error two or more\n  2. there is no variant: add a [[variant]] table for each"
    );
    assert_eq!(changed("name = \"full\"", "name = \"High\""), "s.toml: variant `High` is there twice");
    assert!(changed("max_steps = 5", "max_steps = 0").starts_with("s.toml, variant `high`: training.max_steps is 0"));
    assert!(changed("seeds = [1, 2]", "seeds = [1]\nmetric = \"bleu\"").starts_with("metric = \"bleu\" is not known"));
    let no_data = read(&STUDY.replace("validation = \"v.jsonl\"", "").replace(", val_set_size = 0.1", "")).unwrap_err();
    assert_eq!(
        no_data,
        "s.toml, variant `high`: there is nothing to pick the learning rate on: set data.validation in the study"
    );
    assert_eq!(
        changed("seeds = [1, 2]", "seeds = [1]\nmetric = \"exact_match\"\nset.evaluation.generate = false")
            .lines()
            .next(),
        Some("s.toml, line 6, column 1: not valid TOML: duplicate key")
    );
    let generate = STUDY
        .replace("seeds = [1, 2]", "seeds = [1]\nmetric = \"exact_match\"")
        .replace("micro_batch_size = 3", "micro_batch_size = 3, evaluation.generate = false");
    assert_eq!(
        read(&generate).unwrap_err(),
        "s.toml, variant `high`: the metric is exact_match, but evaluation.generate is false"
    );
}
