"""The queue: what to submit when, and what became of it. No Snakemake here.

dialects    LSF and JH as data: how to submit, ask and kill, and how to read the answers
site        the site's commands, each with a time limit
script      the stub that is submitted and the job script that it starts
ledger      which job stands for which work, on disk; one holder at a time
hosts       free cards of each target
service     targets whose hosts are down, or whose preflight failed
board       why each run waits, and what people ask to end
work        what the queue is asked to do, and by what rules
admission   what to submit now (pure)
ending      what became of a job, from its files and the scheduler's reason
submit      one submission, and what the scheduler answered
earlier     jobs that no work here follows, and that may live again
follow      submitted work, until its end
spool       the dispatcher: all of the above, one poll at a time
watch       `xdimo status`
preflight   `xdimo doctor --here`: what a job finds on the machine it was given
look        `xdimo doctor`: what can be seen before anything is submitted
"""
