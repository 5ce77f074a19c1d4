import { ErrorNote } from '@/components/ErrorNote';
import type { Gpu } from '@/types/api';
import { Button, Group, Text } from '@mantine/core';
import { useMutation, useQueryClient } from '@tanstack/react-query';
import { useId } from 'react';
import { useTranslation } from 'react-i18next';
import { drainGpu, gpusQuery, undrainGpu } from './queries';

/** Before a notebook is closed: nothing new goes there. Or its opposite. */
export function Drain({ gpu }: { gpu: Gpu }) {
  const { t } = useTranslation();
  const queryClient = useQueryClient();
  const text = useId();
  const changing = useMutation({
    mutationFn: (): Promise<unknown> => (gpu.draining ? undrainGpu(gpu.id) : drainGpu(gpu.id)),
    onSuccess: () => queryClient.invalidateQueries({ queryKey: gpusQuery.queryKey }),
  });
  return (
    <>
      {changing.error ? <ErrorNote error={changing.error} /> : null}
      <Group gap="sm" wrap="nowrap">
        <Button
          variant="default"
          size="xs"
          flex="none"
          loading={changing.isPending}
          onClick={() => changing.mutate()}
          aria-label={t(gpu.draining ? 'gpus.undrainNamed' : 'gpus.drainNamed', { name: gpu.name })}
          aria-describedby={text}
        >
          {t(gpu.draining ? 'gpus.undrain' : 'gpus.drain')}
        </Button>
        <Text size="xs" c="dimmed" id={text}>
          {t('gpus.drainText')}
        </Text>
      </Group>
    </>
  );
}
