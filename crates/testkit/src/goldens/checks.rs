//! Measured errors beside their limits.

/// One comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Check {
    /// What was compared.
    pub what: String,
    /// How far off it is.
    pub error: f64,
    /// How far off it may be.
    pub limit: f64,
    /// More about a failure, for people.
    pub note: String,
}

impl Check {
    fn holds(&self) -> bool {
        self.error <= self.limit // false for NaN
    }

    /// Used share of the limit; NaN counts as more than everything.
    fn severity(&self) -> f64 {
        match (self.holds(), self.limit > 0.0) {
            (true, true) => self.error / self.limit,
            (true, false) => 0.0,
            (false, _) if self.error.is_nan() => f64::INFINITY,
            (false, true) => self.error / self.limit,
            (false, false) => f64::INFINITY,
        }
    }
}

/// All comparisons of a case; of those of one kind, the worst.
#[derive(Clone, Debug, Default)]
pub struct Checks {
    list: Vec<Check>,
}

impl Checks {
    /// Notes an error and its limit. Of several of the same `what`, the worst stays.
    pub fn add(&mut self, what: &str, error: f64, limit: f64, note: impl FnOnce() -> String) {
        let mut check = Check { what: what.to_owned(), error, limit, note: String::new() };
        if !check.holds() {
            check.note = note();
        }
        match self.list.iter_mut().find(|other| other.what == what) {
            Some(other) if other.severity() >= check.severity() => {}
            Some(other) => *other = check,
            None => self.list.push(check),
        }
    }

    /// Notes whether two values are equal.
    pub fn equal<T: PartialEq + std::fmt::Debug + ?Sized>(&mut self, what: &str, expected: &T, got: &T) {
        let error = if expected == got { 0.0 } else { f64::INFINITY };
        self.add(what, error, 0.0, || format!("expected {}, got {}", shortened(expected), shortened(got)));
    }

    /// Notes the largest difference of two lists of values of the same length.
    pub fn largest(&mut self, what: &str, expected: &[f32], got: &[f32], limit: f64) {
        if expected.len() != got.len() {
            self.add(what, f64::INFINITY, limit, || format!("expected {} values, got {}", expected.len(), got.len()));
            return;
        }
        let difference = |i: usize| f64::from((expected[i] - got[i]).abs());
        let worse = |a: &usize, b: &usize| difference(*a).total_cmp(&difference(*b)); // NaN is the largest
        let Some(at) = (0..expected.len()).max_by(worse) else { return };
        self.add(what, difference(at), limit, || format!("element {at}: expected {}, got {}", expected[at], got[at]));
    }

    /// Whether nothing was compared.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Every comparison, in the order they were first made.
    pub fn list(&self) -> &[Check] {
        &self.list
    }

    /// What does not hold, if anything.
    pub fn failure(&self) -> Option<String> {
        let mut failures = self.list.iter().filter(|check| !check.holds());
        let first = failures.next()?;
        let others: Vec<&str> = failures.map(|check| check.what.as_str()).collect();
        let mut text = match first.limit > 0.0 {
            true => format!("{} is off by {:.3e}, allowed {:.3e}", first.what, first.error, first.limit),
            false => format!("{} differs", first.what),
        };
        if !first.note.is_empty() {
            text += &format!(" ({})", first.note);
        }
        if !others.is_empty() {
            text += &format!("; so do: {}", others.join(", "));
        }
        Some(text)
    }
}

fn shortened<T: std::fmt::Debug + ?Sized>(value: &T) -> String {
    let text = format!("{value:?}");
    match text.char_indices().nth(160) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// 2-norm.
pub fn norm(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|value| f64::from(value).powi(2)).sum::<f64>().sqrt()
}

/// 2-norm of the difference of two lists of the same length.
pub fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_of_a_kind_stays_and_not_a_number_fails() {
        let mut checks = Checks::default();
        checks.add("loss", 1e-6, 1e-5, String::new);
        checks.add("loss", 2e-6, 1e-5, String::new);
        checks.largest("logits", &[1.0, 2.0], &[1.0, 2.0], 0.0);
        assert_eq!((checks.list().len(), checks.list()[0].error), (2, 2e-6));
        assert_eq!(checks.failure(), None);
        checks.add("loss", f64::NAN, 1e-5, || "step 3".to_owned());
        assert_eq!(checks.failure().as_deref(), Some("loss is off by NaN, allowed 1.000e-5 (step 3)"));
        checks.largest("logits", &[1.0, f32::NAN], &[1.5, 2.0], 1.0);
        assert!(checks.failure().is_some_and(|text| text.ends_with("so do: logits")));
    }
}
