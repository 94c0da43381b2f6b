//! The compiled kernels that the program carries, and which of them a GPU can run.

/// One `.cu` file compiled for one target.
#[derive(Debug)]
pub struct Image {
    /// `dropout` of `cuda/dropout.cu`.
    pub family: &'static str,
    /// `sm_80`, `sm_90a`: machine code for that architecture; `compute_90`: PTX, which the driver compiles.
    pub target: &'static str,
    /// The cubin, or the PTX with a final NUL.
    pub bytes: &'static [u8],
    /// What its kernels use; empty for PTX.
    pub kernels: &'static [Resources],
}

/// What `ptxas -v` said of one kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resources {
    /// Entry point.
    pub name: &'static str,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes a thread stores to local memory for want of registers.
    pub spill_stores: u32,
    /// Bytes a thread loads back.
    pub spill_loads: u32,
    /// Static shared memory of a block in bytes.
    pub shared: u32,
}

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Compute capability of a GPU: major, minor.
pub type Capability = (i32, i32);

impl Image {
    /// How well the image fits a GPU, higher is better; `None` where it cannot run.
    ///
    /// Machine code runs on its own major version from its own minor version on; with the suffix `a` it runs on
    /// exactly its version. PTX runs on its version and everything later, and is the last choice.
    fn fit(&self, gpu: Capability) -> Option<i32> {
        if let Some(ptx) = self.target.strip_prefix("compute_") {
            return (capability(ptx)? <= gpu).then_some(0);
        }
        let version = self.target.strip_prefix("sm_")?;
        let exact = version.ends_with('a');
        let (major, minor) = capability(version.trim_end_matches('a'))?;
        let runs = if exact { gpu == (major, minor) } else { gpu.0 == major && gpu.1 >= minor };
        runs.then_some(1 + minor)
    }
}

/// `(9, 0)` of `90`: the last digit is the minor version.
fn capability(version: &str) -> Option<Capability> {
    let number: i32 = version.parse().ok()?;
    Some((number / 10, number % 10))
}

/// The best image of a family for a GPU.
pub fn fitting(images: &'static [Image], family: &str, gpu: Capability) -> Option<&'static Image> {
    let candidates = images.iter().filter(|image| image.family == family);
    candidates
        .filter_map(|image| Some((image.fit(gpu)?, image)))
        .max_by_key(|(fit, _)| *fit)
        .map(|(_, image)| image)
}

/// Families with at least one image, in order.
pub fn families() -> Vec<&'static str> {
    let mut families: Vec<&str> = IMAGES.iter().map(|image| image.family).collect();
    families.dedup();
    families
}

/// Kernels × architectures: `2 kernels × 4 architectures (sm_80 sm_86 sm_89 sm_90a) and PTX for compute_90: …`.
pub fn inventory() -> String {
    let mut kernels: Vec<&str> =
        IMAGES.iter().flat_map(|image| image.kernels).map(|kernel| kernel.name).collect();
    let mut targets: Vec<&str> = IMAGES.iter().map(|image| image.target).collect();
    for names in [&mut kernels, &mut targets] {
        names.sort_unstable();
        names.dedup();
    }
    let (ptx, architectures): (Vec<&str>, Vec<&str>) =
        targets.iter().partition(|target| target.starts_with("compute_"));
    format!(
        "{} kernels × {} architectures ({}) and PTX for {}: {}",
        kernels.len(),
        architectures.len(),
        architectures.join(" "),
        ptx.join(" "),
        kernels.join(" ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn image(target: &'static str) -> Image {
        Image { family: "x", target, bytes: &[], kernels: &[] }
    }

    static ALL: [Image; 5] =
        [image("sm_80"), image("sm_86"), image("sm_89"), image("sm_90a"), image("compute_90")];

    fn chosen(gpu: Capability) -> Option<&'static str> {
        fitting(&ALL, "x", gpu).map(|image| image.target)
    }

    #[test]
    fn a_gpu_gets_the_closest_image_that_runs_on_it() {
        assert_eq!(chosen((7, 5)), None);
        assert_eq!(chosen((8, 0)), Some("sm_80"));
        assert_eq!(chosen((8, 6)), Some("sm_86"));
        assert_eq!(chosen((8, 7)), Some("sm_86"));
        assert_eq!(chosen((8, 9)), Some("sm_89"));
        assert_eq!(chosen((9, 0)), Some("sm_90a"));
        assert_eq!(chosen((10, 0)), Some("compute_90"));
        assert_eq!(chosen((12, 1)), Some("compute_90"));
        assert!(fitting(&ALL, "y", (9, 0)).is_none());
    }
}
