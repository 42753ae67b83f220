"""Every word of summaries and plots, in both languages, as data.

Each pair has the same ``{placeholders}`` in the same order, so that the two summaries say the same
numbers in the same order.
"""

from xdimo.report.definitions import DEFINITIONS

LANGUAGES = ("en", "zh")

# key: (English, Chinese)
WORDS: dict[str, tuple[str, str]] = {
    # document
    "demo": (
        "**This is the demo**: a small model on this machine's CPU, to show the pipeline. "
        "Its figures say nothing about any GPU.",
        "**这是演示**：在本机 CPU 上训练的小模型，只用于展示流程，其数字不代表任何 GPU。",
    ),
    "campaign": (
        "Campaign `{campaign}`: {done} of {runs} runs measured.",
        "测试批次 `{campaign}`：已完成 {done} / {runs} 次运行。",
    ),
    "campaign_twins": (
        "Runs outside the matrix, of cells asked for by name: {done}.",
        "矩阵之外，按名称指定的单元：{done} 次运行。",
    ),
    "other_language": ("中文：[summary.zh.md](summary.zh.md)", "English: [summary.md](summary.md)"),
    "rows_from": (
        "Rows from runs: {runs}. Columns from their log lines: parameters `header.effective`, "
        "memory `memory.peak_reserved_gib` (CPU: `host_peak_gib`), peak `header.devices` and "
        "`hardware.yaml`, throughput, MFU and speedup `window.wall_s`.",
        "各行数据来自运行：{runs}。各列来自其日志行：模型参数 `header.effective`，"
        "显存 `memory.peak_reserved_gib`（CPU：`host_peak_gib`），峰值 `header.devices` 与 "
        "`hardware.yaml`，吞吐量、MFU 与加速比 `window.wall_s`。",
    ),
    "none": ("none", "无"),
    # section headings
    "main": ("Results: each target at its baseline variant", "结果：各硬件的基线变体"),
    "best": ("Best variant of each target", "各硬件的最佳变体"),
    "definitions": ("How each number is made", "各数字的计算方法"),
    "plots": ("Plots", "图"),
    "modes": (
        "Data modes: each target's baseline, and cells measured in both",
        "数据模式：各硬件的基线，以及两种模式都已测的单元",
    ),
    "trust": ("Why these figures may be believed", "这些数字为何可信"),
    "hours": ("Hours of training", "训练所需小时数"),
    "cells": ("Cells and their commands", "各单元及其命令"),
    "runs": ("Run by run", "逐次运行"),
    "history": ("Earlier measurements", "历史测量"),
    "cards": ("Cards: peaks and their sources", "硬件峰值及其来源"),
    "dataset": ("Dataset", "数据集"),
    "code": ("Code and versions", "代码与版本"),
    "notes": ("Notes (of the rows marked †)", "备注（标 † 的行）"),
    "fields": (
        "Here and below a cell's name leads to the log of its median run, a run's row to its own. "
        "Their log lines: rates, intervals, MFU and hours `window.wall_s` and `step.step_s`, "
        "median step `step.step_s`, memory `memory.peak_reserved_gib`, data wait "
        "`step.data_wait_s`, loss `step.loss`; state, attempt and host `run.json`. Range, CV and "
        "speedup interval are of all measured runs of the cells, which *Run by run* has.",
        "此处及以下，单元名链接到其中位数运行的日志，每次运行的行链接到它自己的日志。所用日志行：速率、"
        "区间、MFU 与小时数 `window.wall_s` 和 `step.step_s`，单步中位数 `step.step_s`，显存 "
        "`memory.peak_reserved_gib`，等待数据 `step.data_wait_s`，损失 `step.loss`；"
        "状态、尝试与主机 `run.json`。范围、变异系数与加速比区间取自各单元的所有已测运行，"
        "见“逐次运行”。",
    ),
    # the seven columns, and the eighth of the second table
    "hardware": ("Hardware", "硬件"),
    "parameters": ("Parameters", "模型参数"),
    "memory": ("Memory", "显存占用"),
    "peak": ("FP16 peak", "硬件浮点峰值(FP16)"),
    "throughput": ("Throughput (tokens, samples)", "token/样本吞吐量"),
    "mfu": ("MFU", "MFU(浮点利用率)"),
    "speedup": ("Speedup", "加速比"),
    "same_batch": ("Iso-batch speedup", "同批量加速比"),
    # tables of trust
    "classes": (
        "**Classes of steps** (log lines `step`): how many, and their median. Only regular steps "
        "vary by chance and make the interval; all timed ones are in the throughput. Steady from: "
        "the first step that already took what the window's steps take.",
        "**步的类别**（日志行 `step`）：个数与中位数。只有常规步随机波动并构成置信区间；"
        "所有计时步都计入吞吐量。稳态起始步：用时已与窗口相同的第一步。",
    ),
    "comparison": (
        "**What stands beside each speedup**: shown, not refused. Where model, precision, FLOP "
        "formula, data mode or dataset differ there is no speedup. Speedup of the reference: the "
        "same ratio, both cells in the reference implementation, which is tuned for no card.",
        "**加速比的旁注**：只列出，不据此拒绝。模型、精度、浮点公式、数据模式或数据集不同，"
        "则不给加速比。参考实现的加速比：两个单元都用参考实现时的同一比值，参考实现没有针对任何卡调优。",
    ),
    "ceilings": (
        "**Ceilings** (log lines `calibration`, mean of ranks, before and after): MFU against the "
        "declared peak, the tensor peak, and a large square product measured on the same cards for "
        "`gemm_s` seconds (a line without it: 0.2, which gave 5 % more on an H100 than 1). "
        "A GPU whose product after differs by over 5 % from before flags its row; a CPU does not: "
        "what it gives to plain work nobody keeps steady.",
        "**上限**（日志行 `calibration`，各进程前后平均）：相对声明峰值、张量峰值，"
        "以及在同一批卡上实测的大矩阵乘（持续 `gemm_s` 秒；没有该项的行为 0.2 秒，"
        "结果高 5 %，在 H100 上与 1 秒相比）的 MFU。GPU 的矩阵乘前后相差超过 5 % 则标记该行；"
        "CPU 不标记：其矩阵乘速率本来就不稳定。",
    ),
    "under_load": (
        "**Cards under load** (log lines `telemetry`, over the timed window). Power is of all "
        "cards together, from the window's second second on (a reading is the mean of the second "
        "before it); others: processes not of the run on its cards / other cards of the host "
        "at work; links: PCIe generation / width / NVLinks up.",
        "**负载下的卡**（日志行 `telemetry`，计时窗口内）。功率为所有卡之和，"
        "自窗口第二秒起（读数是此前一秒的均值）；"
        "其他：本次所用卡上的外来进程 / 主机上在工作的其他卡；链路：PCIe 代 / 宽度 / NVLink 数。",
    ),
    "drift": (
        "**Drift** (log lines `step` and `telemetry`): the first tenth of the timed window → its "
        "last; medians of the steps, means of the clocks, and the hottest card at the first and "
        "at the last reading. Where a cell has a throughput, no change of over 2 % stood "
        "out from the scatter of its steps: what stands here may be that scatter, which is large "
        "on a busy CPU. A window of seconds says little of heat: `config/long.yaml` trains for "
        "minutes.",
        "**漂移**（日志行 `step` 与 `telemetry`）：计时窗口最初十分之一 → 最后十分之一。"
        "单步时间取中位数，频率取均值，温度为最热的卡在首次与末次读数时的值。"
        "有吞吐量的单元，没有超过 2 % 且能与随机波动区分的变化；"
        "此处所见可能只是波动，在繁忙的 CPU 上波动很大。"
        "几秒的窗口说明不了热漂移：`config/long.yaml` 训练数分钟。",
    ),
    "shares": (
        "**Parts of the step** (log line `ledger`), from steps profiled outside the timed window; "
        "an all-reduce counts where nothing hides it, and *other* is a device idle between "
        "launches or at work that belongs to no part. A profiler slows a step: the shares are of "
        "the longer one.",
        "**一步的组成**（日志行 `ledger`），来自计时窗口之外的剖析；"
        "all-reduce 只计未被掩盖的部分；“其他”为设备在两次启动之间空闲，或不属于任何部分的工作。"
        "剖析会拖慢一步：占比是对拖慢后的一步而言。",
    ),
    "steady_from": ("Steady from step", "稳态起始步"),
    "tau": ("Autocorrelation time, steps", "自相关时间，步"),
    "class_regular": ("Regular", "常规"),
    "class_first": ("First", "首步"),
    "class_capture": ("Capture", "捕获"),
    "class_checkpoint": ("Checkpoint", "检查点"),
    "class_epoch": ("Epoch edge", "轮次边界"),
    "class_warmup": ("Warm-up", "预热"),
    "class_stall": ("Stall", "停顿"),
    "scaling": ("Scaling over GPUs of one card", "同种卡的多卡扩展"),
    "efficiency": ("Efficiency", "效率"),
    "implementation": ("Implementation", "实现"),
    "speedup_reference": ("Speedup of the reference", "参考实现的加速比"),
    "mfu_declared": ("MFU (declared peak)", "MFU（声明峰值）"),
    "mfu_tensor": ("MFU (tensor peak)", "MFU（张量峰值）"),
    "mfu_measured": ("MFU (measured product)", "MFU（实测矩阵乘）"),
    "gemm": ("Product, TFLOP/s", "矩阵乘，TFLOP/s"),
    "gemm_change": ("After against before", "之后相对之前"),
    "copy": ("Copy, GB/s", "复制，GB/s"),
    "all_reduce": ("All-reduce, GB/s", "All-reduce，GB/s"),
    "sm_mhz": ("SM MHz, median (lowest)", "SM MHz，中位数（最低）"),
    "memory_mhz": ("Memory MHz", "显存 MHz"),
    "power": ("Power, W", "功率，W"),
    "energy": ("J/sample", "J/样本"),
    "window": ("Window, s", "窗口，秒"),
    "step_ends": ("Step, ms", "单步，毫秒"),
    "step_change": ("Change", "变化"),
    "sm_mhz_ends": ("SM MHz", "SM MHz"),
    "temperature": ("Hottest card, °C", "最热的卡，°C"),
    "throttle": ("Throttled, share of samples", "降频，占采样的比例"),
    "others": ("Others", "其他"),
    "host_load": ("Host load", "主机负载"),
    "links": ("Links", "链路"),
    "profiled_ms": ("Profiled step, ms", "剖析的一步，毫秒"),
    "profiled_change": ("Against the timed step", "与计时步之差"),
    "part_data": ("Data wait", "等待数据"),
    "part_host_to_device": ("Host to device", "主机到设备"),
    "part_vae": ("VAE", "VAE"),
    "part_forward": ("Forward", "前向"),
    "part_backward": ("Backward", "反向"),
    "part_all_reduce": ("Exposed all-reduce", "未掩盖的 all-reduce"),
    "part_optimizer": ("Optimizer, EMA", "优化器与 EMA"),
    "part_other": ("Other", "其他"),
    "stated": ("stated", "标称"),
    "measured": ("measured", "实测"),
    "not_calibrated": ("not calibrated", "未校准"),
    "products": ("points: measured products m × k × n", "点：实测矩阵乘 m × k × n"),
    "measured_product": ("measured product {tflops}", "实测矩阵乘 {tflops}"),
    "axis_tflops": ("TFLOP/s a card (log)", "每卡 TFLOP/s（对数）"),
    "axis_intensity": ("FLOPs a byte (log)", "每字节浮点运算（对数）"),
    "roofs_of": ("{target}, calibrated with {cell}", "{target}，标定取自 {cell}"),
    "title_roofline": (
        "Roofline: stated peaks, measured products and copies, and the training step",
        "屋顶线：标称峰值、实测矩阵乘与复制，以及训练步",
    ),
    "step_of": ("step of {cell}", "{cell} 的一步"),
    # other columns
    "cell": ("Cell", "单元"),
    "state": ("State", "状态"),
    "repeats": ("Repeats", "重复次数"),
    "samples_per_s": ("Samples/s", "样本/秒"),
    "range": ("Min to max", "最小至最大"),
    "ci95": ("Mean, 95 % interval", "均值的 95 % 置信区间"),
    "ci95_run": ("95 % interval", "95 % 置信区间"),
    "too_short": (
        "window too short: n = {n}, autocorrelation time {tau} steps",
        "窗口太短：n = {n}，自相关时间 {tau} 步",
    ),
    "long_steps": (
        "no interval: {count} of {n} steps take {share} of the time",
        "无区间：{count} 步（共 {n} 步）占用了 {share} 的时间",
    ),
    "steps_per_s": ("Steps/s", "步/秒"),
    "command": ("Command", "命令"),
    "mode": ("Data mode", "数据模式"),
    "step_ms": ("Median step, ms", "单步中位数，毫秒"),
    "data_wait": ("Data wait", "等待数据"),
    "hours_10k": ("10,000 steps, h", "10,000 步，小时"),
    "hours_1m": ("1,000,000 steps, h", "1,000,000 步，小时"),
    "run": ("Run", "运行"),
    "attempt": ("Attempt", "尝试"),
    "host": ("Host", "主机"),
    "loss": ("Loss, start to end", "损失，始至末"),
    "record": ("Record", "记录"),
    "gpus": ("GPUs", "GPU 数"),
    "global_batch": ("Global batch", "全局批量"),
    "claimed_tflops": ("Claimed TFLOP/s", "声称 TFLOP/s"),
    "recomputed_tflops": ("Recomputed TFLOP/s", "重算 TFLOP/s"),
    "claimed_mfu": ("Claimed MFU", "声称 MFU"),
    "recomputed_mfu": ("Recomputed MFU", "重算 MFU"),
    "precision": ("Precision", "精度"),
    "declared_model": ("Declared model", "声明的模型"),
    "effective_model": ("Effective model", "实际的模型"),
    "confidence": ("Confidence", "可信度"),
    "their_note": ("Their note", "原记录的备注"),
    "video": ("Video", "视频"),
    "status": ("Status", "状态"),
    "video_short": ("short", "过短"),
    "video_duplicate": ("duplicate", "重复"),
    "video_unreadable": ("unreadable", "不可读"),
    "reason": ("Reason", "原因"),
    "commit": ("Commit", "提交"),
    "dirty": ("Dirty", "有未提交修改"),
    "run_count": ("Runs", "运行数"),
    "package": ("Package", "程序包"),
    "target": ("Target", "硬件目标"),
    "device": ("Device", "设备"),
    "versions": ("Versions", "版本"),
    "tensor_peak": ("Dense tensor peak, TFLOP/s", "稠密张量峰值，TFLOP/s"),
    "declared_peak": ("Declared peak, TFLOP/s", "声明峰值，TFLOP/s"),
    "card_memory": ("Memory GB, bandwidth GB/s", "显存 GB，带宽 GB/s"),
    "sources": ("Sources", "来源"),
    # states
    "ok": ("ok", "完成"),
    "oom": ("OOM", "OOM"),
    "nan": ("NaN", "NaN"),
    "timeout": ("timeout", "超时"),
    "config": ("config error", "配置错误"),
    "data": ("data error", "数据错误"),
    "comm": ("communication failed", "通信失败"),
    "crash": ("crash", "崩溃"),
    "killed": ("killed", "被终止"),
    "oom_host": ("host out of memory", "主机内存不足"),
    "lost": ("lost by the queue", "作业丢失"),
    "rejected": ("rejected by the queue", "被调度系统拒绝"),
    "unavailable": ("out of service", "停用"),
    "pending": ("pending", "待填"),
    "started": ("pending (begun, no outcome yet: {note})", "待填（已开始，尚无结果：{note}）"),
    "changed": (
        "pending (config or videos changed since run: {note})",
        "待填（运行之后配置或视频已改变：{note}）",
    ),
    "unsteady": ("no steady window: {note}", "没有稳态窗口：{note}"),
    "unsteady_word": ("no steady window", "没有稳态窗口"),
    "refused": ("refused: {note}", "记录不可用：{note}"),
    "started_word": ("pending", "待填"),
    "changed_word": ("pending", "待填"),
    "refused_word": ("refused", "记录不可用"),
    "disabled_word": ("out of service", "停用"),
    "unplanned": ("not in the config", "配置中没有"),
    "disabled": ("out of service: {note}", "停用：{note}"),
    "with_reason": ("{word}: {note}", "{word}：{note}"),
    "waits": ("waits for {cell}", "等待 {cell}"),
    "waits_state": ("waits for {cell} ({state})", "等待 {cell}（{state}）"),
    "no_same_batch": ("no batch in common", "没有共同的批量"),
    "not_comparable": ("not comparable: {axes}", "不可比较：{axes}"),
    "model": ("model", "模型"),
    "clip": ("clip", "片段"),
    "FLOP formula": ("FLOP formula", "浮点计算公式"),
    "data mode": ("data mode", "数据模式"),
    "scattered": ("repeats differ: coefficient of variation {cv}", "重复之间差异大：变异系数 {cv}"),
    "cv": ("CV", "变异系数"),
    "speedup_ci95": ("Speedup, 95 % interval", "加速比的 95 % 置信区间"),
    "baseline": ("baseline", "基线"),
    "some_variants": ("{done} of {all} variants measured", "已测 {done} / {all} 个变体"),
    "at": ("{value} at bs{batch}", "{value}（bs{batch}）"),
    # figures
    "unknown": ("n/a", "n/a"),
    "tensor": ("tensor", "张量"),
    "declared": ("declared", "声明"),
    "host_memory": ("{value} GiB host", "{value} GiB 主机内存"),
    "rates": ("{tokens} tokens/s, {samples} samples/s", "{tokens} token/s，{samples} 样本/s"),
    "yes": ("yes", "是"),
    "no": ("no", "否"),
    # flags of metrics.json, by what stands before the colon
    "MFU over 100 %": ("MFU over 100 %", "MFU 超过 100 %"),
    "devices differ": ("devices differ", "设备不一致"),
    "unknown card": ("unknown card, so no MFU", "未知的卡，因此没有 MFU"),
    "not the target's card": ("not the target's card", "不是该目标的卡"),
    "window shorter than asked": ("timed steps fewer than asked", "计时步数少于要求"),
    "throttled": ("throttled, share of the samples", "降频，占采样的比例"),
    "other processes": ("other processes on our cards", "本次使用的卡上有其他进程"),
    "card in use": ("memory in use on our cards before the run", "运行之前所用卡上已占用的显存"),
    "shared host": ("shared host: other cards at work", "共享主机：其他卡在工作"),
    "host load": (
        "shared host: load / the most that the run itself makes",
        "共享主机：负载 / 本次运行自身的上限",
    ),
    "ECC errors": ("uncorrected ECC errors", "不可纠正的 ECC 错误"),
    "card changed": (
        "plain products after the run against before it",
        "运行之后与之前的纯矩阵乘速率之差",
    ),
    "run.json cannot be read": ("run.json cannot be read", "run.json 无法读取"),
    "outside the steps": (
        "time of the window that lies in no step",
        "计时窗口中不属于任何一步的时间",
    ),
    "code dirty": ("code with uncommitted changes", "代码有未提交修改"),
    "commit unknown": ("git does not tell the code's commit", "git 未给出代码的提交号"),
    # sentences
    "random_vae": (
        "**random VAE** (seed {seed}): latents are noise to a viewer; speed and memory are not "
        "affected, losses are not comparable",
        "**随机 VAE**（种子 {seed}）：潜变量没有视觉意义；速度和显存不受影响，损失不可比较",
    ),
    "vae_differs": (
        "{precision} (latents: VAE in {vae})",
        "{precision}（潜变量由 {vae} 的 VAE 编码）",
    ),
    "trained_vae": ("VAE weights: {ids}", "VAE 权重：{ids}"),
    "no_vae_yet": ("VAE weights: {weights}, not used yet", "VAE 权重：{weights}，尚未使用"),
    "bad_manifest": (
        "{name}: its manifest cannot be read, so the runs were not held against the videos: {why}",
        "{name}：清单无法读取，因此未核对各次运行所用的视频：{why}",
    ),
    "bad_history": ("**Not shown**: {why}", "**未显示**：{why}"),
    "no_manifest": (
        "{name}: no manifest yet (`xdimo manifest` reads the videos).",
        "{name}：尚无清单（`xdimo manifest` 读取视频）。",
    ),
    "manifest": (
        "{name} (`{dataset}`): {files} files, {readable} readable, {usable} usable, "
        "{short} shorter than {window} frames, {duplicate} duplicate, {unreadable} unreadable.",
        "{name}（`{dataset}`）：{files} 个文件，{readable} 个可读，{usable} 个可用，"
        "{short} 个不足 {window} 帧，{duplicate} 个重复，{unreadable} 个不可读。",
    ),
    "excluded": ("Not used, and not replaced by another video:", "未使用，也未用其他视频代替："),
    "mixed_code": (
        "**Warning**: the runs used here come from {count} versions of the code.",
        "**警告**：此处的运行来自 {count} 个不同版本的代码。",
    ),
    "dirty_code": (
        "**Warning**: code with uncommitted changes made {runs}.",
        "**警告**：以下运行使用了有未提交修改的代码：{runs}。",
    ),
    "no_code": ("No run has been measured yet.", "尚无已完成的运行。"),
    "earlier_attempt": ("attempt {number}: {state}", "第 {number} 次尝试：{state}"),
    "cut_off": ("cut off, without an outcome", "中断，无结果"),
    "history_note": (
        "Each row is a line of {file}; `xdimo audit` explains what it claims. "
        "Recomputed TFLOP/s = steps/s × global batch × model FLOPs a sample of the effective "
        "model; recomputed MFU divides by GPUs × dense tensor peak of the card.",
        "每行对应 {file} 中的一行；`xdimo audit` 解释其声称的数字。"
        "重算 TFLOP/s = 步/秒 × 全局批量 × 实际模型每样本的浮点运算；"
        "重算 MFU 再除以 GPU 数 × 该卡的稠密张量峰值。",
    ),
    # plots
    "no_plots": ("Not drawn yet: `xdimo plot` draws them.", "尚未绘制：用 `xdimo plot` 绘制。"),
    "no_peak": ("no known peak", "峰值未知"),
    "no_peak_measured": (
        "no known peak; {share} of the measured product",
        "峰值未知；为实测矩阵乘的 {share}",
    ),
    "no_data": ("no measurement yet", "尚无测量"),
    "axis_speedup": ("speedup over {baseline}", "相对 {baseline} 的加速比"),
    "axis_throughput": ("samples/s", "样本/秒"),
    "axis_mfu": ("MFU, %", "MFU，%"),
    "axis_memory": ("memory a device, GiB", "每设备内存，GiB"),
    "axis_steps": ("step", "步"),
    "axis_step_ms": ("step time, ms (log)", "单步时间，毫秒（对数）"),
    "title_speedup": ("Speedup", "加速比"),
    "title_throughput": ("Throughput", "吞吐量"),
    "title_mfu": ("MFU against the tensor peak", "相对张量峰值的 MFU"),
    "title_memory": ("Peak memory", "内存峰值"),
    "title_steps": (
        "Step time of each cell's median run, warm-up shaded",
        "各单元中位运行的单步时间（阴影为预热）",
    ),
    "whiskers": (
        "bar: median run; whisker: min to max of repeats",
        "柱：中位数运行；须：重复的最小至最大",
    ),
    "against_declared": ("against the declared peak", "相对声明峰值"),
    "card": ("card", "显卡"),
    "card_frame": ("frame: what the card has", "外框：显卡显存"),
    "host_process": ("host, largest process", "主机，最大进程"),
}


class Words:
    """The words of one language: ``words("waits", cell=...)``."""

    def __init__(self, language: str):
        self.language = language
        self._index = LANGUAGES.index(language)

    def __call__(self, key: str, **values: object) -> str:
        return WORDS[key][self._index].format(**values)

    def definitions(self, **values: object) -> list[str]:
        return [pair[self._index].format(**values) for pair in DEFINITIONS]
