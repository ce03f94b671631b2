"""The GPU of this machine as the tests' emulator is: of any architecture up to its own, its new memory full of NaN."""

from fastclstm.engines.cuda import gpu


class PoisonedGPU(gpu.GPU):
    """A GPU that plays a smaller one; what it computes for, and how many blocks run at once, is as asked."""

    def __init__(self, true, *, architecture=None, multiprocessors=None, resident=None):
        self.__dict__.update(true.__dict__)
        self._true, self._resident_asked = true, resident
        if architecture is not None:
            self.architecture, self.shared_bytes = architecture, (227 if architecture == 90 else 99) << 10
        self.multiprocessors = multiprocessors or true.multiprocessors
        self.launches = []
        """(kernel, grid, block) of what was launched."""
        self.graphs = []
        """How many launches each graph held."""
        self._names, self._launches_of = {}, {}

    def empty(self, shape, dtype):
        array = super().empty(shape, dtype)
        if array.size:
            with self._context():
                gpu._checked(self._driver.cuMemsetD8Async(array.pointer, 0xFF, array.nbytes, self.stream.handle))
        return array

    def kernel(self, source, name, macros):
        kernel = self._true.kernel(source, name, macros)
        self._names[kernel] = name
        return kernel

    def resident_blocks(self, kernel, threads, shared_bytes):
        most = self._true.resident_blocks(kernel, threads, shared_bytes)
        return most if self._resident_asked is None else min(self._resident_asked, most)

    def launch(self, kernel, grid, block, shared_bytes, *arguments, cooperative=False):
        super().launch(kernel, grid, block, shared_bytes, *arguments, cooperative=cooperative)
        self._note(kernel, grid, block)

    def prepared(self, launch):
        start = super().prepared(launch)

        def noted(numbers):
            start(numbers)
            self._note(launch.kernel, launch.grid, launch.block)

        return noted

    def graph(self, launches):
        made = super().graph(launches)
        self.graphs.append(len(launches))
        self._launches_of[id(made)] = made, launches
        return made

    def send(self, graph):
        super().send(graph)
        for launch in self._launches_of[id(graph)][1]:
            self._note(launch.kernel, launch.grid, launch.block)

    def _note(self, kernel, grid, block):
        self.launches.append((self._names[kernel], (*grid, 1, 1)[:3], (*block, 1, 1)[:3]))
