//! The little of SVG that the plots need: axes with round ticks, text, and paths that hold no NaN.

use std::fmt::Write;

/// Text with the characters that XML and HTML reserve written as entities.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            letter if letter.is_control() && letter != '\n' && letter != '\t' => {}
            letter => escaped.push(letter),
        }
    }
    escaped
}

/// A direction of a plot: values from `low` to `high` lie at pixels `from` to `to`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Axis {
    /// Value at `from`.
    pub low: f64,
    /// Value at `to`.
    pub high: f64,
    /// Whether equal ratios have equal lengths.
    pub log: bool,
    /// Pixel of `low`.
    pub from: f64,
    /// Pixel of `high`.
    pub to: f64,
}

impl Axis {
    /// An axis over some values with a margin at both ends, logarithmic if that is asked for and possible. Values that are
    /// not finite are left out; without values the axis runs from 0 to 1.
    pub fn over(values: impl Iterator<Item = f64>, log: bool, pixels: (f64, f64)) -> Self {
        let (from, to) = pixels;
        let (low, high) = values
            .filter(|value| value.is_finite())
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
        if low > high {
            return Self { low: 0.0, high: 1.0, log: false, from, to };
        }
        let log = log && low > 0.0;
        let (a, b) = if log { (low.ln(), high.ln()) } else { (low, high) };
        let least = if log { 0.2 } else { (0.02 * a.abs()).max(1e-9) };
        let margin = if b - a > 1e-12 * a.abs().max(1e-300) { 0.06 * (b - a) } else { least };
        let (a, b) = (a - margin, b + margin);
        let (low, high) = if log { (a.exp(), b.exp()) } else { (a, b) };
        Self { low, high, log, from, to }
    }

    /// Pixel of a value.
    pub fn at(&self, value: f64) -> f64 {
        let share = match self.log {
            true => (value.max(1e-300) / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        };
        self.from + share.clamp(-10.0, 10.0) * (self.to - self.from)
    }

    /// About `count` round values, with their text.
    pub fn ticks(&self, count: usize) -> Vec<(f64, String)> {
        match self.log {
            true => self.log_ticks(count),
            false => linear_ticks(self.low, self.high, count),
        }
    }

    fn log_ticks(&self, count: usize) -> Vec<(f64, String)> {
        let decades = (self.high / self.low).log10();
        if decades < 0.5 {
            return linear_ticks(self.low, self.high, count);
        }
        let steps: &[f64] = match decades {
            few if few < 1.0 => &[1.0, 1.5, 2.0, 3.0, 5.0, 7.0],
            few if few < 2.0 => &[1.0, 2.0, 5.0],
            few if few < 4.0 => &[1.0, 3.0],
            _ => &[1.0],
        };
        let (first, last) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
        let every = ((last - first) as usize / (count + 2)).max(1);
        (first..=last)
            .step_by(every)
            .flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)))
            .filter(|value| (self.low..=self.high).contains(value))
            .map(|value| (value, short(value)))
            .collect()
    }
}

fn linear_ticks(low: f64, high: f64, count: usize) -> Vec<(f64, String)> {
    let rough = (high - low) / count.max(1) as f64;
    if !(rough > 0.0 && rough.is_finite()) {
        return vec![];
    }
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= rough * 0.999);
    let step = step.unwrap_or(10.0 * power);
    let first = (low / step).ceil() as i64;
    let digits = (-step.log10().floor()).max(0.0) as usize + usize::from((step / power - 2.5).abs() < 1e-6);
    (first..first + 50)
        .map(|index| index as f64 * step)
        .take_while(|value| *value <= high + 1e-9 * step)
        .map(|value| (value, if value.abs() >= 1e4 { short(value) } else { format!("{value:.digits$}") }))
        .collect()
}

/// A number in at most three or four digits: `0.05`, `30`, `12k`, `2.1M`.
pub fn short(value: f64) -> String {
    let (scaled, unit) = match value.abs() {
        large if large >= 9.995e11 => (value / 1e12, "T"),
        large if large >= 9.995e8 => (value / 1e9, "G"),
        large if large >= 9.995e5 => (value / 1e6, "M"),
        large if large >= 9999.5 => (value / 1e3, "k"),
        small if small < 1e-3 && small > 0.0 => return format!("{value:.0e}"),
        _ => (value, ""),
    };
    let digits = match scaled.abs() {
        big if big >= 99.95 => 0,
        middle if middle >= 9.995 => 1,
        one if one >= 0.9995 => 2,
        _ => 4,
    };
    let text = format!("{scaled:.digits$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{unit}")
}

/// A path through points; those that are not finite break it.
pub fn line(points: impl Iterator<Item = (f64, f64)>) -> String {
    let (mut path, mut pen_down) = (String::new(), false);
    for (x, y) in points {
        if !(x.is_finite() && y.is_finite()) {
            pen_down = false;
            continue;
        }
        let _ = write!(path, "{}{x:.1} {y:.1}", if pen_down { "L" } else { "M" });
        pen_down = true;
    }
    path
}

/// A closed path between an upper and a lower line.
pub fn band(points: &[(f64, f64, f64)]) -> String {
    let good = || points.iter().filter(|(x, low, high)| x.is_finite() && low.is_finite() && high.is_finite());
    let path = line(good().map(|&(x, _, high)| (x, high)).chain(good().rev().map(|&(x, low, _)| (x, low))));
    if path.is_empty() { path } else { path + "Z" }
}

/// Moves positions apart so that neighbours are at least `gap` apart and all lie between `low` and `high` if they fit. The
/// order stays.
pub fn spread(positions: &[f64], gap: f64, low: f64, high: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..positions.len()).collect();
    order.sort_by(|&a, &b| positions[a].total_cmp(&positions[b]));
    let mut placed = positions.to_vec();
    let mut least = low;
    for &index in &order {
        placed[index] = placed[index].max(least);
        least = placed[index] + gap;
    }
    let mut most = high;
    for &index in order.iter().rev() {
        placed[index] = placed[index].min(most);
        most = placed[index] - gap;
    }
    placed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(ticks: &[(f64, String)]) -> Vec<&str> {
        ticks.iter().map(|(_, text)| text.as_str()).collect()
    }

    #[test]
    fn reserved_characters_are_escaped() {
        assert_eq!(escape("<a href=\"x\">'&'\u{7}</a>"), "&lt;a href=&quot;x&quot;&gt;&#39;&amp;&#39;&lt;/a&gt;");
    }

    #[test]
    fn axes_map_values_to_pixels() {
        let axis = Axis { low: 0.0, high: 10.0, log: false, from: 100.0, to: 0.0 };
        assert_eq!((axis.at(0.0), axis.at(5.0), axis.at(10.0)), (100.0, 50.0, 0.0));
        let axis = Axis { low: 1.0, high: 100.0, log: true, from: 0.0, to: 100.0 };
        assert!((axis.at(10.0) - 50.0).abs() < 1e-9);
        assert!(axis.at(0.0).is_finite() && axis.at(-5.0).is_finite());
        let empty = Axis::over([f64::NAN].into_iter(), true, (0.0, 1.0));
        assert_eq!((empty.low, empty.high, empty.log), (0.0, 1.0, false));
        let single = Axis::over([3.0].into_iter(), false, (0.0, 1.0));
        assert!(single.low < 3.0 && single.high > 3.0 && (single.at(3.0) - 0.5).abs() < 1e-9);
        assert!(!Axis::over([-1.0, 1.0].into_iter(), true, (0.0, 1.0)).log, "no logarithm of what is not positive");
    }

    #[test]
    fn ticks_are_round() {
        let axis = |low, high, log| Axis { low, high, log, from: 0.0, to: 1.0 };
        assert_eq!(texts(&axis(0.0, 300.0, false).ticks(5)), ["0", "100", "200", "300"]);
        assert_eq!(texts(&axis(3.55, 4.13, false).ticks(5)), ["3.6", "3.8", "4.0"]);
        assert_eq!(texts(&axis(0.0, 1.2, false).ticks(5)), ["0.00", "0.25", "0.50", "0.75", "1.00"]);
        assert_eq!(texts(&axis(9e2, 2.5e6, true).ticks(5)), ["1000", "3000", "10k", "30k", "100k", "300k", "1M"]);
        assert_eq!(texts(&axis(20.0, 90.0, true).ticks(5)), ["20", "30", "50", "70"]);
        assert_eq!(texts(&axis(20.0, 40.0, true).ticks(5)), ["20", "25", "30", "35", "40"]);
        assert!(axis(1.0, f64::INFINITY, false).ticks(5).is_empty());
    }

    #[test]
    fn short_numbers() {
        let cases = [(0.0, "0"), (0.05, "0.05"), (8960.0, "8960"), (12_345.0, "12.3k"), (2_190_000.0, "2.19M")];
        for (value, text) in cases {
            assert_eq!(short(value), text);
        }
        assert_eq!(
            (short(2e-4), short(999_600.0), short(135e6)),
            ("2e-4".to_owned(), "1M".to_owned(), "135M".to_owned())
        );
    }

    #[test]
    fn paths_hold_only_numbers() {
        assert_eq!(line([(0.0, 1.0), (f64::NAN, 1.0), (2.0, 3.0), (4.0, 5.0)].into_iter()), "M0.0 1.0M2.0 3.0L4.0 5.0");
        assert_eq!(
            band(&[(0.0, 1.0, 2.0), (1.0, f64::INFINITY, 2.0), (3.0, 1.0, 2.0)]),
            "M0.0 2.0L3.0 2.0L3.0 1.0L0.0 1.0Z"
        );
        assert_eq!(band(&[]), "");
    }

    #[test]
    fn labels_are_moved_apart() {
        assert_eq!(spread(&[10.0, 11.0, 50.0], 12.0, 0.0, 100.0), [10.0, 22.0, 50.0]);
        assert_eq!(spread(&[99.0, 98.0], 12.0, 0.0, 100.0), [100.0, 88.0]);
        assert!(spread(&[], 12.0, 0.0, 100.0).is_empty());
    }
}
