"""How each number of a summary is made, in both languages: the bullets under its tables.

Each pair has the same ``{placeholders}`` in the same order, as in xdimo.report.words.
"""

# (English, Chinese)
DEFINITIONS: tuple[tuple[str, str], ...] = (
    (
        "**Row**: one cell, `target-bsN` with N clips a GPU; all its figures are of one run, "
        "the median one by samples/s (of an even number the lower middle), named under the table.",
        "**行**：一个单元，`target-bsN` 表示每 GPU N 个片段。整行数字来自同一次运行，"
        "即样本/秒排在中间的中位数运行（偶数次取中间较低者），其名称列在表下。",
    ),
    (
        "**Parameters**: all of the model, position tables included: {parameters}.",
        "**模型参数**：模型的全部参数，含位置表：{parameters}。",
    ),
    (
        "**Memory**: GiB a card, peak reserved by the allocator, largest rank. On a CPU: peak "
        "resident memory of the largest process.",
        "**显存占用**：每卡 GiB，分配器保留的峰值，取最大的进程。"
        "在 CPU 上：最大进程的常驻内存峰值。",
    ),
    (
        "**FP16 peak**: dense TFLOP/s a card: *declared* is the figure in the site's own table, "
        "*tensor* the dense FP16/BF16 tensor rate with FP32 accumulation of the device that was "
        "measured; one figure where both agree.",
        "**硬件浮点峰值(FP16)**：每卡稠密 TFLOP/s：“声明”是站点表格中的数字，"
        "“张量”是实测设备的稠密 FP16/BF16 张量峰值（FP32 累加）；两者相同时只写一个。",
    ),
    (
        "**Throughput**: samples/s = timed steps × global batch / wall time of the timed window, "
        "so stalls count; tokens/s = samples/s × {tokens} tokens a sample. A sample is one clip of "
        "{frames} frames, a token one latent patch of one frame.",
        "**token/样本吞吐量**：样本/秒 = 计时步数 × 全局批量 / 计时窗口的墙钟时间，停顿计入；"
        "token/秒 = 样本/秒 × 每样本 {tokens} 个 token。一个样本是 {frames} 帧的片段，"
        "一个 token 是一帧中的一个潜变量块。",
    ),
    (
        "**MFU** = model FLOP/s / (GPUs × peak), {flops} TFLOP a training sample: matmul, conv and "
        "attention products, 2 per multiply-add, top-k experts only, backward = 2 × forward, "
        "recompute and VAE not counted. Each percentage names its peak in TFLOP/s. tf32 and fp32 "
        "runs are held against the same FP16/BF16 tensor peak. A card without known peak has none.",
        "**MFU(浮点利用率)** = 模型 FLOP/s /（GPU 数 × 峰值），每训练样本 {flops} TFLOP："
        "矩阵乘、卷积与注意力乘积，每乘加记 2，只计 top-k 专家，反向 = 2 × 前向，"
        "不计重算和 VAE。每个百分比都注明其峰值（TFLOP/s）。tf32 与 fp32 运行也以同一 "
        "FP16/BF16 张量峰值为准。峰值未知的卡没有 MFU。",
    ),
    (
        "**Speedup**: samples/s over those of `{baseline}`. **Iso-batch**: samples/s over those of "
        "the baseline's target at the same clips a GPU; where it lacks this variant, both at the "
        "largest one they share, which is named.",
        "**加速比**：样本/秒与 `{baseline}` 之比。**同批量加速比**：与基线所在硬件在相同的每 GPU "
        "片段数下之比；若没有该变体，则双方取共有的最大者，并注明。",
    ),
    (
        "**Step**: one optimizer step; the median of the timed steps. **Data wait**: share of the "
        "timed window that the loop waited for data; a GPU may be at work meanwhile, and the "
        "shares of the step tell when it was not. **Loss**: median of the first and of the last "
        "tenth of the timed steps. **Interval**: of a cell Student's, of the mean over 3 or "
        "more repeats; of a run that of its own steps (docs/measurement.md).",
        "**步**：一次优化器更新，取计时步的中位数。**等待数据**：计时窗口中循环等待数据的比例；"
        "此时 GPU 可能仍在计算，真正的空等见各步的时间构成。"
        "**损失**：计时步最初与最后十分之一的中位数。**置信区间**：单元的为 3 次及以上"
        "重复均值的 Student 区间；单次运行的来自其自身各步（docs/measurement.md）。",
    ),
)
