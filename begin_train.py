
import os, runpy, sys
os.chdir('/tmp/pytest-of-root/pytest-60/test_examples_of_extending_run2')
for stream in (1, 2):
    os.dup2(os.open('said.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
sys.path.insert(0, '/tmp/wt_docs')
sys.argv = ['train.py', '--arch=my_net.py:make_net', '--dataset=digits', '--attack=apgd', '--epochs=1', '--n_ex_train=128', '--at_iter=2', '--device=cpu', '--threads=1']
runpy.run_path('/tmp/wt_docs/train.py', run_name="__main__")
