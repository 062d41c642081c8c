//! Pictures of bytes and their resizing, as Pillow does it up to version 11, byte for byte: first across, then down, with a
//! kernel that grows with the reduction (so that nothing is skipped), weights in fixed point, bytes in between. Later versions
//! go down first for some sizes, and torch has coarser weights: both then differ by a rounding, or a little more where the
//! cubic overshoots.

/// Rows of pixels, each of `channels` bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Pixels from top to bottom.
    pub height: usize,
    /// Pixels from left to right.
    pub width: usize,
    /// Bytes of a pixel.
    pub channels: usize,
    /// `[height, width, channels]`.
    pub bytes: Vec<u8>,
}

/// The kernel of a resizing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// The nearest pixel.
    Nearest,
    /// A triangle.
    Bilinear,
    /// Keys's cubic with a = -1/2.
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Self::Nearest => 0.5,
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let x = x.abs();
        match self {
            Self::Nearest => 1.0,
            Self::Bilinear => (1.0 - x).max(0.0),
            Self::Bicubic if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
            Self::Bicubic => 0.0,
        }
    }
}

/// Bits behind the point of a weight.
const PRECISION: u32 = 22;

/// First input pixel and weights of an output pixel.
struct Window {
    first: usize,
    weights: Vec<i64>,
}

fn windows(input: usize, output: usize, filter: Filter) -> Vec<Window> {
    let scale = input as f64 / output as f64;
    let grown = scale.max(1.0);
    let support = filter.support() * grown;
    if filter == Filter::Nearest {
        // Pillow adds up the steps, and with them their rounding.
        let centers = std::iter::successors(Some(scale * 0.5), |center| Some(center + scale)).take(output);
        let nearest = |center: f64| Window { first: (center as usize).min(input - 1), weights: vec![1 << PRECISION] };
        return centers.map(nearest).collect();
    }
    let window = |index: usize| {
        let center = (index as f64 + 0.5) * scale;
        let first = (center - support + 0.5).max(0.0) as usize;
        let end = ((center + support + 0.5) as usize).min(input);
        let raw: Vec<f64> = (first..end).map(|at| filter.weight((at as f64 - center + 0.5) / grown)).collect();
        let sum: f64 = raw.iter().sum();
        let weights = raw.iter().map(|weight| (weight / sum * f64::from(1u32 << PRECISION)).round() as i64).collect();
        Window { first, weights }
    };
    (0..output).map(window).collect()
}

fn byte(sum: i64) -> u8 {
    ((sum + (1 << (PRECISION - 1))) >> PRECISION).clamp(0, 255) as u8
}

impl Picture {
    /// The picture with other sides, each at least 1.
    pub fn resized(&self, height: usize, width: usize, filter: Filter) -> Self {
        let across = if width == self.width { self.clone() } else { self.resized_across(width, filter) };
        if height == self.height { across } else { across.resized_down(height, filter) }
    }

    fn resized_across(&self, width: usize, filter: Filter) -> Self {
        let windows = windows(self.width, width, filter);
        let mut bytes = Vec::with_capacity(self.height * width * self.channels);
        for row in self.bytes.chunks_exact(self.width * self.channels) {
            for Window { first, weights } in &windows {
                for channel in 0..self.channels {
                    let pixel = |offset: usize| i64::from(row[(first + offset) * self.channels + channel]);
                    bytes.push(byte(weights.iter().enumerate().map(|(offset, weight)| weight * pixel(offset)).sum()));
                }
            }
        }
        Self { height: self.height, width, channels: self.channels, bytes }
    }

    fn resized_down(&self, height: usize, filter: Filter) -> Self {
        let stride = self.width * self.channels;
        let mut bytes = Vec::with_capacity(height * stride);
        for Window { first, weights } in &windows(self.height, height, filter) {
            for column in 0..stride {
                let pixel = |offset: usize| i64::from(self.bytes[(first + offset) * stride + column]);
                bytes.push(byte(weights.iter().enumerate().map(|(offset, weight)| weight * pixel(offset)).sum()));
            }
        }
        Self { height, width: self.width, channels: self.channels, bytes }
    }

    /// The middle of the picture; what lies outside of it is black.
    pub fn center_cropped(&self, height: usize, width: usize) -> Self {
        let top = (self.height as isize - height as isize).div_euclid(2);
        let left = (self.width as isize - width as isize).div_euclid(2);
        let mut bytes = vec![0; height * width * self.channels];
        for row in 0..height {
            for column in 0..width {
                let (y, x) = (top + row as isize, left + column as isize);
                if (0..self.height as isize).contains(&y) && (0..self.width as isize).contains(&x) {
                    let from = (y as usize * self.width + x as usize) * self.channels;
                    let to = (row * width + column) * self.channels;
                    bytes[to..to + self.channels].copy_from_slice(&self.bytes[from..from + self.channels]);
                }
            }
        }
        Self { height, width, channels: self.channels, bytes }
    }

    /// The picture in a mirror.
    pub fn mirrored(&self) -> Self {
        let rows = self.bytes.chunks_exact(self.width * self.channels);
        let bytes = rows.flat_map(|row| row.chunks_exact(self.channels).rev().flatten().copied()).collect();
        Self { bytes, ..*self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 4 x 6, one channel, `17 i mod 256`.
    fn picture() -> Picture {
        Picture { height: 4, width: 6, channels: 1, bytes: (0..24u32).map(|i| (i * 37 % 256) as u8).collect() }
    }

    #[test]
    fn sizes_are_those_of_pillow() {
        assert_eq!(picture().resized(2, 3, Filter::Bilinear).bytes, BILINEAR_2_3);
        assert_eq!(picture().resized(7, 5, Filter::Bicubic).bytes, BICUBIC_7_5);
        assert_eq!(picture().resized(3, 4, Filter::Nearest).bytes, NEAREST_3_4);
        assert_eq!(picture().resized(4, 6, Filter::Bicubic), picture());
        let flat = Picture { bytes: vec![200; 24], ..picture() };
        assert!(flat.resized(9, 2, Filter::Bicubic).bytes.iter().all(|&byte| byte == 200));
    }

    #[test]
    fn crops_and_mirrors() {
        let cropped = picture().center_cropped(2, 2);
        assert_eq!(cropped.bytes, [8 * 37 % 256, 9 * 37 % 256, 14 * 37 % 256, 15 * 37 % 256].map(|v: u32| v as u8));
        let padded = cropped.center_cropped(4, 2);
        assert_eq!((padded.bytes[0], padded.bytes[2], padded.bytes[7]), (0, cropped.bytes[0], 0));
        let mirrored = picture().mirrored();
        assert_eq!(mirrored.bytes[..6].iter().rev().copied().collect::<Vec<u8>>(), picture().bytes[..6]);
        assert_eq!(mirrored.mirrored(), picture());
    }

    /// Pillow 11.3's.
    const BILINEAR_2_3: [u8; 6] = [80, 73, 135, 168, 84, 81];
    const NEAREST_3_4: [u8; 12] = [0, 74, 111, 185, 188, 6, 43, 117, 154, 228, 9, 83];
    const BICUBIC_7_5: [u8; 35] = [
        0, 50, 96, 141, 184, 59, 29, 85, 129, 172, 178, 3, 62, 107, 150, 209, 75, 26, 88, 130, 201, 163, 13, 67, 110,
        172, 204, 84, 35, 88, 154, 221, 128, 17, 76,
    ];
}
