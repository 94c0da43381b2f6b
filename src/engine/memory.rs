//! How many tokens the caches may hold.

use sysinfo::System;
use tch::Device;

use crate::kernels::gpu::Gpu;
use crate::model::decoder::Decoder;
use crate::model::kv_cache::KvCache;

/// The share of free memory that caches may take; the rest is for activations, scores and everyone else.
const SHARE: f64 = 0.5;

/// Tokens whose keys and values fit into half of the memory that is free now; `None` where the system does not say how
/// much that is.
pub fn cached_tokens(decoder: &Decoder) -> Option<usize> {
    let free = free_memory(decoder.device())? as f64 * SHARE;
    let token = KvCache::bytes_per_token(decoder.config(), decoder.kind()).max(1);
    Some((free / token as f64) as usize)
}

fn free_memory(device: Device) -> Option<u64> {
    if let Device::Cuda(index) = device {
        return Gpu::at(index).and_then(|gpu| gpu.memory()).ok().map(|(free, _)| free as u64);
    }
    let refresh = sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::everything());
    let system = System::new_with_specifics(refresh).ok()?;
    // A container may be allowed less than the machine has.
    let allowed = system.cgroup_limits().map_or(u64::MAX, |limits| limits.free_memory);
    Some(system.available_memory().min(allowed))
}
