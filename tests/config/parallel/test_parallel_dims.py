import itertools

from launcher.config.parallel.base import ParallelDims


def test_every_rank_has_coordinates_of_its_own():
    dims = ParallelDims(pipeline=2, data=2, shard=3, sequence=2, tensor=2)
    kinds = ("pipeline", "data", "shard", "sequence", "tensor")
    places = [tuple(dims.coordinate(rank, kind) for kind in kinds) for rank in range(dims.product)]
    assert places == list(itertools.product(*map(range, (2, 2, 3, 2, 2))))


def test_ranks_that_share_samples_have_the_same_data_rank():
    dims = ParallelDims(pipeline=2, data=2, tensor=2)
    assert [dims.data_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert (dims.data_parallel, dims.copies) == (2, 4)


def test_only_what_divides_something_is_named():
    assert str(ParallelDims(data=4)) == "data 4 = 4"
    assert str(ParallelDims(pipeline=2, shard=3)) == "pipeline 2 × shard 3 = 6"
    assert ParallelDims().named() == {"data": 1}
