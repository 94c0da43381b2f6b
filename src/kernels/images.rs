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

/// Families for every GPU that the program supports. The others are for one architecture alone, and what they compute
/// one of these computes too.
pub fn portable_families() -> Vec<&'static str> {
    families().into_iter().filter(|family| is_portable(&IMAGES, family)).collect()
}

fn is_portable(images: &[Image], family: &str) -> bool {
    images.iter().any(|image| image.family == family && image.target.starts_with("compute_"))
}

/// Kernels × architectures: `2 kernels × 4 architectures (sm_80 sm_86 sm_89 sm_90a) and PTX for compute_90: …`, and those
/// that are for some of these alone.
pub fn inventory() -> String {
    let [kernels, special] = [true, false].map(|portable| {
        sorted(
            IMAGES
                .iter()
                .filter(|image| is_portable(&IMAGES, image.family) == portable)
                .flat_map(|image| image.kernels.iter().map(move |kernel| (kernel.name, image.target))),
        )
    });
    let names = |of: &[(&'static str, &'static str)]| sorted(of.iter().map(|(kernel, _)| *kernel));
    let targets = sorted(IMAGES.iter().map(|image| image.target));
    let (ptx, architectures): (Vec<&str>, Vec<&str>) =
        targets.iter().partition(|target| target.starts_with("compute_"));
    let mut text = format!(
        "{} kernels × {} architectures ({}) and PTX for {}: {}",
        names(&kernels).len(),
        architectures.len(),
        architectures.join(" "),
        ptx.join(" "),
        names(&kernels).join(" ")
    );
    if !special.is_empty() {
        let only = sorted(special.iter().map(|(_, target)| *target)).join(" ");
        text += &format!("; for {only} alone: {}", names(&special).join(" "));
    }
    text
}

fn sorted<T: Ord>(items: impl Iterator<Item = T>) -> Vec<T> {
    let mut items: Vec<T> = items.collect();
    items.sort_unstable();
    items.dedup();
    items
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

    #[test]
    fn a_family_of_one_architecture_is_not_for_every_gpu() {
        static SOME: [Image; 2] =
            [image("compute_90"), Image { family: "hopper", target: "sm_90a", bytes: &[], kernels: &[] }];
        assert!(is_portable(&SOME, "x") && !is_portable(&SOME, "hopper"));
        assert!(fitting(&SOME, "hopper", (9, 0)).is_some());
        assert!(fitting(&SOME, "hopper", (10, 0)).is_none() && fitting(&SOME, "hopper", (8, 0)).is_none());
        for family in portable_families() {
            for gpu in [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)] {
                assert!(fitting(&IMAGES, family, gpu).is_some(), "`{family}` for {gpu:?}");
            }
        }
    }
}
