"""The order of training images: the same images make up a step however it is divided, and it can be resumed."""

from functools import partial

from hf_maskformer.training.data_stream import MicroBatches, StreamDataset, micro_batches


def numbers(length, epoch):
    """A data set whose item tells its epoch and index."""
    return [(epoch, index) for index in range(length)]


def batches(count, *, batch_size=2, accumulation=1, num_processes=1, process=0, first_step=0, num_workers=0):
    sampler = MicroBatches(
        batch_size=batch_size,
        accumulation=accumulation,
        num_processes=num_processes,
        process=process,
        first_step=first_step,
    )
    stream = micro_batches(
        StreamDataset(partial(numbers, 5), length=5, seed=3), sampler, list, num_workers=num_workers
    )
    return [next(stream) for _ in range(count)]


def test_every_epoch_holds_each_image_once_in_another_order():
    stream = StreamDataset(partial(numbers, 50), length=50, seed=0)
    first, second = ([stream[p] for p in range(e * 50, (e + 1) * 50)] for e in (0, 1))
    assert sorted(first) == [(0, i) for i in range(50)]
    assert sorted(second) == [(1, i) for i in range(50)]
    assert [i for _, i in first] != [i for _, i in second]


def test_eight_images_are_two_processes_with_four_and_four_passes_of_two():
    whole = batches(3, batch_size=8)
    passes = batches(12, batch_size=2, accumulation=4)
    ranks = [batches(3, batch_size=4, num_processes=2, process=p) for p in (0, 1)]
    for step in range(3):
        assert whole[step] == [image for batch in passes[4 * step : 4 * step + 4] for image in batch]
        assert whole[step] == ranks[0][step] + ranks[1][step]


def test_a_resumed_stream_goes_on_where_the_first_one_was():
    assert batches(8, accumulation=2)[6:] == batches(2, accumulation=2, first_step=3)


def test_reader_processes_change_nothing():
    assert batches(6) == batches(6, num_workers=2)
